"""Studies that are killed, interrupted, timed out and broken: nothing that finished is lost or run twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.trial import FrozenTrial, TrialState
from support.commands import SLOW_STEPS, Station, run_cli, wait_until
from support.configs import study_overrides

from finetune.files.run_folder import checkpoint_step, checkpoints_in
from sweeps.study.study import FINISHED, Study

NO_END = ("trainer.max_steps=100000", "trainer.eval_steps=0", "trainer.save_steps=5")
"""A trial that goes on until it is stopped."""


def folder_of(place: Path, name: str = "s") -> Path:
    return place / "outputs" / "sweeps" / name


def trials_of(place: Path, *states: TrialState) -> list[FrozenTrial]:
    return Study.load(folder_of(place)).trials(*states)


def result_of(place: Path, number: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder_of(place) / "trials" / str(number) / "result.json").read_text())
    return content


def told(trial: FrozenTrial) -> tuple[Any, ...]:
    return trial.number, trial.state, trial.params, trial.values, trial.intermediate_values


def written_at(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def require_params_agree(place: Path) -> None:
    """Storage, overrides and config of each finished trial say the same."""
    for trial in trials_of(place, *FINISHED):
        folder = folder_of(place) / "trials" / str(trial.number)
        if trial.state == TrialState.FAIL and not (folder / "run.json").exists():
            continue  # killed each time before its run began
        overrides = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text())
        given = dict(line.split("=", 1) for line in overrides)
        config = json.loads((folder / "run.json").read_text())["config"]
        for name, value in trial.params.items():
            section, key = name.split(".")
            assert float(given[name]) == config[section][key] == value


@pytest.mark.fault
@pytest.mark.parametrize(("slots", "wanted"), [(1, 25), (3, 12)])
def test_kills_lose_nothing_and_run_nothing_twice(
    slots: int, wanted: int, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    """A study of twelve, and another where one has all its trials before its kills."""
    chance, kills, round_ = random.Random(4), 0, 0
    while kills < wanted:
        kills += kill_a_study(station, tiny_base, tmp_path / str(round_), chance, wanted - kills, slots)
        round_ += 1


def kill_a_study(station: Station, tiny_base: Path, place: Path, chance: random.Random, kills: int, slots: int) -> int:
    """Begin a study, kill it so often, end it, and see that all is right; returns how often it was killed."""
    study = [
        *study_overrides(tiny_base, "s"),
        f"hydra.sweeper.slots={slots}",
        "hydra.sweeper.n_trials=12",
        "hydra.sweeper.max_failure_rate=1",  # a slow machine may lose all that it begins
        "trainer.max_steps=8",
        "trainer.save_steps=1",
    ]
    folder, killed = folder_of(place), 0
    finished: dict[int, tuple[Any, ...]] = {}
    while killed < kills:
        process = station.start(*study, cwd=place)
        wait_until(lambda: " trials to go" in process.said(), process)  # noqa: B023
        time.sleep(chance.uniform(0, 5))
        if process.poll() is not None:
            break
        process.kill()
        killed += 1

        # as a reader finds it: all lines are whole but the last, which may be torn
        *whole, _ = (folder / "study.journal").read_bytes().split(b"\n")
        assert all(isinstance(json.loads(line), dict) for line in whole)
        trials = trials_of(place)
        assert len(trials) == 12
        now = {trial.number: (told(trial), result_lines(place, trial)) for trial in trials if trial.state in FINISHED}
        assert {number: now[number] for number in finished} == finished
        finished = now
    ended = station.run(*study, cwd=place)
    assert ended.returncode == 0, ended.stderr

    trials = trials_of(place, *FINISHED)
    assert [trial.number for trial in trials] == list(range(12))
    assert {trial.number: (told(trial), result_lines(place, trial)) for trial in trials}.items() >= finished.items()
    for trial in trials:
        if trial.state == TrialState.FAIL:
            assert trial.user_attrs["error"] == "lost its worker 3 times without a new checkpoint"
            assert len(trial.user_attrs["starts"]) >= 3
            assert len(set(trial.user_attrs["starts"][-3:])) == 1
        else:
            result = result_of(place, trial.number)
            assert result["status"] == {"COMPLETE": "completed", "PRUNED": "pruned"}[trial.state.name]
            assert (result["engine"], result["slots"]) == ("packed", slots)
            steps = [row["step"] for row in metrics_of(folder / "trials" / str(trial.number)) if "train/loss" in row]
            assert steps == list(range(1, result["step"] + 1)), "steps were lost, or trained twice"
    assert any(trial.state == TrialState.COMPLETE for trial in trials)
    require_params_agree(place)
    return killed


def result_lines(place: Path, trial: FrozenTrial) -> tuple[int, str]:
    """When and what the trial's training wrote last; test rows are seen later, by the winner and the baseline."""
    folder = folder_of(place) / "trials" / str(trial.number)
    training = [line for line in read(folder / "metrics.jsonl").splitlines() if "test/loss" not in line]
    return written_at(folder / ".hydra" / "overrides.yaml"), "\n".join(training)


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if "second" not in name} for row in rows]


@pytest.mark.fault
def test_a_killed_study_is_the_study_that_was_not(station: Station, tiny_base: Path, tmp_path: Path) -> None:
    more = ("hydra.sweeper.n_trials=3", "trainer.max_steps=24", "trainer.save_steps=4", "hydra/sweeper/pruner=none")
    study = study_overrides(tiny_base, "s")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ended = station.run(*study, *more, cwd=whole)
    assert ended.returncode == 0, ended.stderr
    process = station.start(*study, *more, cwd=killed, before=SLOW_STEPS)
    adopted = folder_of(killed) / "trials" / "1"
    wait_until(lambda: any(checkpoint_step(path) >= 8 for path in checkpoints_in(adopted / "checkpoints")), process)
    process.kill()
    assert checkpoints_in(adopted / "checkpoints"), "killed too late"
    assert not (adopted / "result.json").exists()
    log = (adopted / "train.log").read_text()

    ended = station.run(*study, *more, cwd=killed)
    assert ended.returncode == 0, ended.stderr
    assert "2 of 3 trials to go" in ended.stderr
    assert "going on from step" in (adopted / "train.log").read_text().removeprefix(log)
    assert [told(trial) for trial in trials_of(killed)] == [told(trial) for trial in trials_of(whole)]
    for number in range(3):
        one, other = (folder_of(place) / "trials" / str(number) for place in (killed, whole))
        weights = Path("adapter") / "adapter_model.safetensors"
        assert (one / weights).read_bytes() == (other / weights).read_bytes()
        assert metrics_of(one) == metrics_of(other)


@pytest.mark.fault
def test_a_killed_pack_is_the_pack_that_was_not(station: Station, tiny_base: Path, tmp_path: Path) -> None:
    """To float32's rounding: what trains beside a trial is not the same after the kill."""
    more = ("hydra.sweeper.n_trials=4", "trainer.max_steps=24", "trainer.save_steps=4", "hydra/sweeper/pruner=none")
    study = [*study_overrides(tiny_base, "s"), *more, "hydra.sweeper.slots=3", "hydra/sweeper/sampler=random"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ended = station.run(*study, cwd=whole)
    assert ended.returncode == 0, ended.stderr
    process = station.start(*study, cwd=killed, before=SLOW_STEPS)
    trials = folder_of(killed) / "trials"
    begun = [trials / str(number) for number in range(3)]
    wait_until(lambda: all(checkpoints_in(trial / "checkpoints") for trial in begun), process)
    process.kill()
    assert not any((trial / "result.json").exists() for trial in begun), "killed too late"

    ended = station.run(*study, cwd=killed)
    assert ended.returncode == 0, ended.stderr
    assert "4 of 4 trials to go" in ended.stderr
    for trial in begun:
        assert (trial / "train.log").read_text().count("going on from step") == 1
    assert [trial.number for trial in trials_of(killed, TrialState.COMPLETE)] == [0, 1, 2, 3]
    for one, other in zip(trials_of(killed), trials_of(whole), strict=True):
        assert one.params == other.params
        assert one.values == pytest.approx(other.values, rel=1e-5)
        ours, theirs = (metrics_of(folder_of(place) / "trials" / str(one.number)) for place in (killed, whole))
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        for row, known in zip(ours, theirs, strict=True):
            assert row.get("train/loss", 0) == pytest.approx(known.get("train/loss", 0), rel=1e-5)


@pytest.mark.fault
@pytest.mark.parametrize(("workers", "slots"), [(1, 1), (2, 1), (4, 1), (1, 3), (2, 2)])
def test_any_number_of_workers_give_exactly_the_trials(
    workers: int, slots: int, tiny_base: Path, tmp_path: Path
) -> None:
    more = ("hydra.sweeper.n_trials=9", f"hydra.sweeper.n_jobs={workers}", f"hydra.sweeper.slots={slots}")
    ended = run_cli(*study_overrides(tiny_base, "s"), *more, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert ended.returncode == 0, ended.stderr

    assert [trial.number for trial in trials_of(tmp_path, TrialState.COMPLETE, TrialState.PRUNED)] == list(range(9))
    assert all(trial.user_attrs["starts"] == [0] for trial in trials_of(tmp_path))
    require_params_agree(tmp_path)
    journal = map(json.loads, (folder_of(tmp_path) / "study.journal").read_text().splitlines())
    took = [line["trial_id"] for line in journal if line["op_code"] == 6 and line["state"] == TrialState.RUNNING]
    assert sorted(took) == list(range(9))


def workers_of(process: subprocess.Popen[str], place: Path) -> list[int]:
    """Its worker processes that hold a trial's folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            opened = [os.readlink(link) for link in (folder / "fd").iterdir()]
        except OSError:
            continue
        if any(path.startswith(str(folder_of(place) / "trials")) and path.endswith(".lock") for path in opened):
            found.append(int(folder.name))
    return [pid for pid in found if pid != process.pid]


@pytest.mark.fault
def test_a_worker_killed_beside_others_is_replaced_in_the_same_command(tiny_base: Path, tmp_path: Path) -> None:
    more = ("hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=2", "trainer.max_steps=12", "trainer.save_steps=4")
    process = start_slowly([*study_overrides(tiny_base, "s"), *more], tmp_path)
    wait_until(lambda: len(workers_of(process, tmp_path)) == 2, process)
    wait_until(lambda: any(folder_of(tmp_path).glob("trials/*/checkpoints/checkpoint-*")), process)
    os.kill(workers_of(process, tmp_path)[0], signal.SIGKILL)
    _, said = process.communicate(timeout=240)

    assert process.returncode == 0, said
    assert "a worker was lost" in said
    assert [trial.number for trial in trials_of(tmp_path, *FINISHED)] == list(range(6))
    assert not trials_of(tmp_path, TrialState.FAIL)
    require_params_agree(tmp_path)


def start_slowly(study: list[str], cwd: Path) -> subprocess.Popen[str]:
    """A study in processes of its own, whose workers' steps are slow too."""
    (cwd / "sitecustomize.py").write_text(SLOW_STEPS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(cwd)}
    command = [sys.executable, "-m", "finetune", *study]
    pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=environment, start_new_session=True, **pipes)


def with_two_workers(tiny_base: Path, cwd: Path) -> tuple[list[str], subprocess.Popen[str]]:
    """A study whose two workers train trials of many steps without a checkpoint."""
    more = ("hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=2", "trainer.max_steps=100", "trainer.save_steps=0")
    study = [*study_overrides(tiny_base, "s"), *more, "hydra/sweeper/pruner=none"]
    process = start_slowly(study, cwd)
    metrics = [folder_of(cwd) / "trials" / str(trial) / "metrics.jsonl" for trial in range(2)]
    wait_until(lambda: all("train/loss" in read(path) for path in metrics), process)
    return study, process


def require_clean_end(cwd: Path, study: list[str], station: Station) -> None:
    """Both running trials have a checkpoint at the step where they ended, and go on from there."""
    steps = []
    for trial in range(2):
        result = result_of(cwd, trial)
        assert result["status"] == "interrupted"
        checkpoints = checkpoints_in(folder_of(cwd) / "trials" / str(trial) / "checkpoints")
        assert [path.name for path in checkpoints] == [f"checkpoint-{result['step']}"]
        steps.append(result["step"])
    assert len(trials_of(cwd, TrialState.WAITING)) == 1, "a trial has begun after the interruption"
    assert not list(folder_of(cwd).glob(".stop-*"))
    ended = station.run(*study, "hydra.sweeper.n_jobs=1", cwd=cwd)
    assert ended.returncode == 0, ended.stderr
    for trial, step in enumerate(steps):
        assert f"going on from step {step}" in read(folder_of(cwd) / "trials" / str(trial) / "train.log")
    assert len(trials_of(cwd, TrialState.COMPLETE)) == 3


@pytest.mark.fault
@pytest.mark.parametrize("everyone", [False, True], ids=["the command alone", "as a terminal sends it"])
def test_workers_end_cleanly_when_the_study_is_interrupted(
    everyone: bool, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    study, process = with_two_workers(tiny_base, tmp_path)
    (os.killpg if everyone else os.kill)(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)

    assert process.returncode == 1
    assert "error: interrupted; the same command with hydra.sweeper.study_name=s goes on" in said.splitlines()
    assert "Traceback" not in said
    require_clean_end(tmp_path, study, station)


def lives(pid: int) -> bool:
    """Whether a process has not ended; one that nobody has asked for its exit code has."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.fault
def test_workers_end_cleanly_when_their_sweeper_is_killed(station: Station, tiny_base: Path, tmp_path: Path) -> None:
    study, process = with_two_workers(tiny_base, tmp_path)
    workers = workers_of(process, tmp_path)
    process.kill()
    process.communicate(timeout=60)  # till the workers have closed it too

    assert not any(lives(worker) for worker in workers)
    require_clean_end(tmp_path, study, station)


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_study_says_how_to_go_on_and_does(
    number: int, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    more = ("hydra.sweeper.n_trials=2", "trainer.max_steps=40", "trainer.save_steps=0")
    study = study_overrides(tiny_base, "s")
    process = station.start(*study, *more, cwd=tmp_path, before=SLOW_STEPS)
    wait_until(lambda: "train/loss" in read(folder_of(tmp_path) / "trials/0/metrics.jsonl"), process)
    process.send_signal(number)
    ended = process.wait()

    assert ended.returncode == 1
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: interrupted; the same command with hydra.sweeper.study_name=s goes on"]
    assert "Traceback" not in ended.stderr
    assert result_of(tmp_path, 0)["status"] == "interrupted"
    step = result_of(tmp_path, 0)["step"]
    ended = station.run(*study, *more, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert f"going on from step {step}" in read(folder_of(tmp_path) / "trials/0/train.log")
    assert len(trials_of(tmp_path, *FINISHED)) == 2


SLOW_WORD = """
import time
import sweeps.answer.conclusion
sweeps.answer.conclusion.say_last_word = lambda *_, **__: time.sleep(60)
"""
"""The last word takes a minute."""


@pytest.mark.fault
def test_an_interrupted_last_word_says_how_to_have_it(station: Station, tiny_base: Path, tmp_path: Path) -> None:
    study = [*study_overrides(tiny_base, "s"), "hydra.sweeper.n_trials=1", "hydra.sweep.dir=my studies/x"]
    process = station.start(*study, cwd=tmp_path, before=SLOW_WORD)
    wait_until(lambda: "the last word" in process.said(), process)
    process.send_signal(signal.SIGINT)
    ended = process.wait()

    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "error: interrupted; python -m sweeps best 'my studies/x' takes the winner"
    ended = station.run("best", "my studies/x", cwd=tmp_path, module="sweeps")
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "my studies" / "x" / "best" / "adapter").exists()


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_pack_ends_each_trial_with_a_checkpoint(
    number: int, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    more = ("hydra.sweeper.n_trials=4", "trainer.max_steps=60", "trainer.save_steps=0", "hydra.sweeper.slots=3")
    study = [*study_overrides(tiny_base, "s"), *more]
    process = station.start(*study, cwd=tmp_path, before=SLOW_STEPS)
    begun = [folder_of(tmp_path) / "trials" / str(trial) for trial in range(3)]
    wait_until(lambda: all("train/loss" in read(trial / "metrics.jsonl") for trial in begun), process)
    process.send_signal(number)
    ended = process.wait()

    assert ended.returncode == 1
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: interrupted; the same command with hydra.sweeper.study_name=s goes on"]
    assert "Traceback" not in ended.stderr
    steps = []
    for trial in begun:
        result = json.loads((trial / "result.json").read_text())
        assert result["status"] == "interrupted"
        assert [path.name for path in checkpoints_in(trial / "checkpoints")] == [f"checkpoint-{result['step']}"]
        steps.append(result["step"])
    assert len(trials_of(tmp_path, TrialState.RUNNING)) == 3
    assert len(trials_of(tmp_path, TrialState.WAITING)) == 1, "a trial has begun after the interruption"
    ended = station.run(*study, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    for trial, step in zip(begun, steps, strict=True):
        assert f"going on from step {step}" in read(trial / "train.log")
    assert [trial.number for trial in trials_of(tmp_path, *FINISHED)] == [0, 1, 2, 3]
    assert not trials_of(tmp_path, TrialState.FAIL)


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


AN_HOUR_PASSES = """
import time
from finetune.engine.reporter import Reporter
step, now = Reporter.step, time.time
def late_step(*arguments, **more):
    time.time = lambda: now() + 3600
    return step(*arguments, **more)
Reporter.step = late_step
"""
"""By the clock, with the first step."""


@pytest.mark.slow
def test_time_that_is_over_ends_the_study(station: Station, tiny_base: Path, tmp_path: Path) -> None:
    more = (*NO_END, "hydra.sweeper.timeout=3600", "hydra.sweeper.baseline=false", "hydra.sweeper.n_trials=4")
    ended = station.run(*study_overrides(tiny_base, "s"), *more, cwd=tmp_path, before=AN_HOUR_PASSES)
    assert ended.returncode == 0, ended.stderr

    (trial,) = trials_of(tmp_path, *FINISHED)
    assert trial.state == TrialState.PRUNED
    assert trial.user_attrs["reason"] == "out of time"
    assert not trials_of(tmp_path, TrialState.RUNNING)
    assert result_of(tmp_path, 0)["status"] == "pruned"


@pytest.mark.fault
def test_a_trial_that_lost_its_worker_waits_for_the_next_session_where_time_is_over(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    study = [*study_overrides(tiny_base, "s"), "hydra.sweeper.n_trials=2"]
    assert station.run(*study, cwd=tmp_path, before=DIES).returncode == -signal.SIGKILL
    ended = station.run(*study, "hydra.sweeper.timeout=0.1", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr

    assert [trial.state for trial in trials_of(tmp_path)] == [TrialState.RUNNING, TrialState.WAITING]
    ended = station.run(*study, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert len(trials_of(tmp_path, TrialState.COMPLETE)) == 2


@pytest.mark.slow
def test_a_running_trial_can_be_stopped(station: Station, tiny_base: Path, tmp_path: Path) -> None:
    more = (*NO_END, "hydra.sweeper.baseline=false", "hydra.sweeper.n_trials=1")
    process = station.start(*study_overrides(tiny_base, "s"), *more, cwd=tmp_path)
    wait_until(lambda: "train/loss" in read(folder_of(tmp_path) / "trials/0/metrics.jsonl"), process)
    stopped = station.run("stop", "s", "0", cwd=tmp_path, module="sweeps")
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout.splitlines()[-1] == "trial 0 ends at its next step; python -m sweeps show s"
    ended = process.wait()
    assert ended.returncode == 0, ended.stderr

    (trial,) = trials_of(tmp_path)
    assert trial.state == TrialState.PRUNED
    assert trial.user_attrs["reason"] == "told to stop"


DIVERGES = ("hydra.sweeper.start=[{optimizer.learning_rate: 1e20}]", "optimizer.learning_rate=choice(1e-3,1e-2,1e20)")


@pytest.mark.slow
def test_a_trial_that_fails_does_not_end_the_study(station: Station, tiny_base: Path, tmp_path: Path) -> None:
    more = (*DIVERGES, "hydra.sweeper.n_trials=3", "seed=1", "trainer.max_steps=12")
    ended = station.run(*study_overrides(tiny_base, "s"), *more, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr

    trials = trials_of(tmp_path)
    assert all(trial.state in FINISHED for trial in trials)
    assert trials[1].state == TrialState.FAIL
    assert trials[1].user_attrs["role"] == "start"
    assert trials[1].user_attrs["error"].startswith("optimizer.learning_rate=1e+20: training diverged at step")
    assert result_of(tmp_path, 1)["error"] == trials[1].user_attrs["error"]
    assert not (folder_of(tmp_path) / "trials" / "1" / "checkpoints").exists()
    assert f"trial 1    failed: {trials[1].user_attrs['error']}" in ended.stderr


TOO_MUCH = """
import sys, types
sys.modules["mine"] = types.ModuleType("mine")
sys.modules["mine"].further = lambda config, trial: trial.suggest_categorical("lora.dropout", [2.0])
"""
"""A custom search space with a value that no run takes."""


@pytest.mark.slow
def test_a_trial_whose_config_is_refused_says_so_in_its_folder(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    space = ("~search", "lora.r=choice(4,16)", "hydra.sweeper.custom_search_space=mine.further")
    study = [*study_overrides(tiny_base, "s"), *space, "hydra.sweeper.n_trials=1"]
    ended = station.run(*study, cwd=tmp_path, before=TOO_MUCH)
    assert ended.returncode == 1

    (trial,) = trials_of(tmp_path, TrialState.FAIL)
    assert trial.user_attrs["error"] == "lora.dropout=2.0: must be at least 0 and below 1"
    assert result_of(tmp_path, 0) == {"status": "failed", "error": trial.user_attrs["error"]}


@pytest.mark.slow
def test_no_failure_allowed_ends_at_the_first(station: Station, tiny_base: Path, tmp_path: Path) -> None:
    more = (*DIVERGES, "hydra.sweeper.n_trials=6", "hydra.sweeper.max_failure_rate=0", "trainer.max_steps=12")
    ended = station.run(*study_overrides(tiny_base, "s"), *more, cwd=tmp_path)
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(
        "error: hydra.sweeper.max_failure_rate=0.0: 1 of 2 trials failed; trial 1: optimizer.learning"
    )
    assert [trial.state for trial in trials_of(tmp_path, *FINISHED)] == [TrialState.COMPLETE, TrialState.FAIL]


SMALL_MEMORY = """
import torch
from finetune.engine.packed.bank import Bank
from finetune.engine.trl import TrlTraining
learn, train = Bank.forward_backward, TrlTraining.train
def fits(rows):
    if rows > 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
def small_learn(self, wishes):
    fits(max(len(wish.rows) for wish in wishes))
    return learn(self, wishes)
def small_train(self, *rest):
    fits(self._config.trainer.per_device_train_batch_size)
    return train(self, *rest)
Bank.forward_backward, TrlTraining.train = small_learn, small_train
"""
"""Batches of two rows fit into memory, larger ones do not."""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["packed", "trl"])
def test_out_of_memory_goes_on_with_half_the_batch(
    engine: str, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    batch = ("trainer.per_device_train_batch_size=4", f"trainer.engine={engine}")
    more = ("hydra.sweeper.n_trials=1", *batch, "tracker=wandb")
    ended = station.run(*study_overrides(tiny_base, "s"), *more, cwd=tmp_path, before=SMALL_MEMORY)
    assert ended.returncode == 0, ended.stderr

    (trial,) = trials_of(tmp_path)
    assert trial.state == TrialState.COMPLETE
    assert "trainer.per_device_train_batch_size=2" in trial.user_attrs["shrunk"]
    assert (result_of(tmp_path, 0)["engine"], result_of(tmp_path, 0)["effective_batch_size"]) == (engine, 4)
    best = yaml.safe_load((folder_of(tmp_path) / "experiment" / "best.yaml").read_text())
    assert best["trainer"]["per_device_train_batch_size"] == 2
    assert best["trainer"]["gradient_accumulation_steps"] == 2
    again = station.run(
        "--config-dir", str(folder_of(tmp_path)), "experiment=best", "hydra.run.dir=again", "tracker=none", cwd=tmp_path
    )
    assert again.returncode == 0, again.stderr
    repeated = json.loads((tmp_path / "again" / "result.json").read_text())
    assert repeated["metrics"]["eval/loss"] == trial.value


@pytest.mark.slow
def test_out_of_memory_twice_is_a_failure(station: Station, tiny_base: Path, tmp_path: Path) -> None:
    more = ("hydra.sweeper.n_trials=1", "trainer.per_device_train_batch_size=8")
    ended = station.run(*study_overrides(tiny_base, "s"), *more, cwd=tmp_path, before=SMALL_MEMORY)
    (trial,) = trials_of(tmp_path)
    assert trial.state == TrialState.FAIL
    assert "out of memory" in trial.user_attrs["error"]
    assert ended.stderr.count("once more with less at once") == 1


DIES = """
import os
from finetune.engine.packed.bank import Bank
Bank.forward_backward = lambda *_: os.kill(os.getpid(), 9)
"""
"""The first batch kills the process."""
LOST = "lost its worker 3 times without a new checkpoint"


@pytest.mark.fault
def test_a_trial_that_kills_its_worker_thrice_is_failed(station: Station, tiny_base: Path, tmp_path: Path) -> None:
    more = ("hydra.sweeper.n_trials=2",)
    study = study_overrides(tiny_base, "s")
    for _ in range(3):
        assert station.run(*study, *more, cwd=tmp_path, before=DIES).returncode == -signal.SIGKILL
        assert trials_of(tmp_path)[0].state == TrialState.RUNNING
    ended = station.run(*study, *more, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr

    first, second = trials_of(tmp_path)
    assert (first.state, first.user_attrs["error"]) == (TrialState.FAIL, LOST)
    assert second.state == TrialState.COMPLETE


KILLS = """
import os
from finetune.engine.packed.bank import Bank
learn = Bank.forward_backward
def kills(self, wishes):
    if any(wish.slot.dropout == 0.03 for wish in wishes):
        os.kill(os.getpid(), 9)
    return learn(self, wishes)
Bank.forward_backward = kills
"""
"""A batch of a trial with this dropout kills the process."""


@pytest.mark.fault
def test_a_trial_that_kills_its_worker_does_not_fail_those_beside_it(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    more = ("hydra.sweeper.n_trials=4", "hydra.sweeper.slots=3", "hydra.sweeper.start=[{lora.dropout: 0.03}]")
    study = [*study_overrides(tiny_base, "s"), *more]
    for _ in range(3):
        assert station.run(*study, cwd=tmp_path, before=KILLS).returncode == -signal.SIGKILL
    ended = station.run(*study, cwd=tmp_path, before=KILLS)
    assert ended.returncode == 0, ended.stderr

    (failed,) = trials_of(tmp_path, TrialState.FAIL)
    assert (failed.number, failed.user_attrs["error"]) == (1, LOST)
    assert len(trials_of(tmp_path, TrialState.COMPLETE, TrialState.PRUNED)) == 3


@pytest.mark.fault
def test_an_interruption_long_ago_does_not_hide_that_a_trial_kills_its_worker(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    study = [*study_overrides(tiny_base, "s"), "hydra.sweeper.n_trials=1", *NO_END]
    process = station.start(*study, cwd=tmp_path)
    wait_until(lambda: "train/loss" in read(folder_of(tmp_path) / "trials/0/metrics.jsonl"), process)
    process.send_signal(signal.SIGINT)
    assert process.wait().returncode == 1
    for _ in range(3):
        assert station.run(*study, cwd=tmp_path, before=DIES).returncode == -signal.SIGKILL
    station.run(*study, cwd=tmp_path, before=DIES)
    assert trials_of(tmp_path)[0].user_attrs.get("error") == LOST


@pytest.mark.fault
@pytest.mark.parametrize("change", ["name=other", "sample_prompts=[Why?]", "tracker=tensorboard"])
def test_what_a_study_lets_change_does_not_fail_a_trial_that_is_taken_on(
    change: str, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    study = [*study_overrides(tiny_base, "s"), "hydra.sweeper.n_trials=1"]
    assert station.run(*study, cwd=tmp_path, before=DIES).returncode == -signal.SIGKILL
    ended = station.run(*study, change, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    (trial,) = trials_of(tmp_path)
    assert trial.state == TrialState.COMPLETE, trial.user_attrs


@pytest.mark.fault
def test_a_trial_that_lost_its_worker_begins_anew_where_the_config_may_change(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    study = [*study_overrides(tiny_base, "s"), "hydra.sweeper.n_trials=1"]
    assert station.run(*study, cwd=tmp_path, before=DIES).returncode == -signal.SIGKILL
    change = ("optimizer.weight_decay=0.1", "hydra.sweeper.allow_change=true")
    ended = station.run(*study, *change, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    (trial,) = trials_of(tmp_path)
    assert trial.state == TrialState.COMPLETE, trial.user_attrs
    config = json.loads((folder_of(tmp_path) / "trials" / "0" / "run.json").read_text())["config"]
    assert config["optimizer"]["weight_decay"] == 0.1


@pytest.mark.slow
def test_fewer_trials_than_before_are_taken_as_the_total(station: Station, tiny_base: Path, tmp_path: Path) -> None:
    study = study_overrides(tiny_base, "s")
    assert station.run(*study, "hydra.sweeper.n_trials=5", cwd=tmp_path, before=DIES).returncode == -signal.SIGKILL
    ended = station.run(*study, "hydra.sweeper.n_trials=2", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert len(trials_of(tmp_path, *FINISHED)) == 2


@pytest.mark.slow
def test_the_memory_of_thirty_trials_is_that_of_five(station: Station, tiny_base: Path, tmp_path: Path) -> None:
    more = ("hydra.sweeper.n_trials=30", "hydra.sweeper.keep_adapters=2", "quantization=nf4")
    ended = station.run(*study_overrides(tiny_base, "s"), *more, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert len(trials_of(tmp_path, *FINISHED)) == 30
    peaks = [result_of(tmp_path, number)["peak_memory_bytes"] / 2**20 for number in range(30)]
    assert max(peaks[26:]) - max(peaks[5:9]) < 8, peaks
    assert len(list(folder_of(tmp_path).glob("trials/*/adapter"))) <= 3


def test_optuna_reads_a_journal_without_us(station: Station, tiny_base: Path, tmp_path: Path) -> None:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    study = study_overrides(tiny_base, "s")
    assert station.run(*study, "hydra.sweeper.n_trials=2", cwd=tmp_path, before=DIES).returncode == -signal.SIGKILL
    storage = JournalStorage(JournalFileBackend(str(folder_of(tmp_path) / "study.journal")))
    assert len(optuna.load_study(study_name="s", storage=storage).trials) == 2
