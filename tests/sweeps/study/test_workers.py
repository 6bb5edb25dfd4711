"""Several workers of one study: the number of trials, lost workers, clean ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from support.commands import SLOW_STEPS, Station, run_cli, wait_until
from support.configs import study_overrides
from support.matrix import further
from support.processes import children_with
from support.study_folder import (
    folder_of,
    read,
    require_params_agree,
    result_of,
    trials_of,
)

from finetune.exit_codes import INTERRUPTED
from finetune.files.run_folder import checkpoints_in
from sweeps.study.study import FINISHED


@pytest.mark.fault
@pytest.mark.parametrize(
    ("workers", "slots"),
    [(2, 2), *further((1, 1), (2, 1), (1, 3), (4, 1))],
)
def test_any_number_of_workers_give_exactly_the_trials(
    workers: int, slots: int, tiny_base: Path, tmp_path: Path
) -> None:
    more = (
        "hydra.sweeper.n_trials=9",
        f"hydra.sweeper.n_jobs={workers}",
        f"hydra.sweeper.slots={slots}",
    )
    ended = run_cli(
        *study_overrides(tiny_base, "s"), *more, cwd=tmp_path, OMP_NUM_THREADS="1"
    )
    assert ended.returncode == 0, ended.stderr

    assert [
        trial.number
        for trial in trials_of(tmp_path, TrialState.COMPLETE, TrialState.PRUNED)
    ] == list(range(9))
    assert all(trial.user_attrs["starts"] == [0] for trial in trials_of(tmp_path))
    require_params_agree(tmp_path)
    journal = map(
        json.loads, (folder_of(tmp_path) / "study.journal").read_text().splitlines()
    )
    took = [
        line["trial_id"]
        for line in journal
        if line["op_code"] == 6 and line["state"] == TrialState.RUNNING
    ]
    assert sorted(took) == list(range(9))


def workers_of(process: subprocess.Popen[str], place: Path) -> list[int]:
    """Its worker processes that hold a trial's folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            opened = [os.readlink(link) for link in (folder / "fd").iterdir()]
        except OSError:
            continue
        if any(
            path.startswith(str(folder_of(place) / "trials")) and path.endswith(".lock")
            for path in opened
        ):
            found.append(int(folder.name))
    return [pid for pid in found if pid != process.pid]


@pytest.mark.fault
def test_a_worker_killed_beside_others_is_replaced_in_the_same_command(
    tiny_base: Path, tmp_path: Path
) -> None:
    more = (
        "hydra.sweeper.n_trials=4",
        "hydra.sweeper.n_jobs=2",
        "trainer.max_steps=8",
        "trainer.save_steps=2",
    )
    process = start_slowly([*study_overrides(tiny_base, "s"), *more], tmp_path)
    wait_until(lambda: len(workers_of(process, tmp_path)) == 2, process)
    wait_until(
        lambda: any(folder_of(tmp_path).glob("trials/*/checkpoints/checkpoint-*")),
        process,
    )
    os.kill(workers_of(process, tmp_path)[0], signal.SIGKILL)
    _, said = process.communicate(timeout=240)

    assert process.returncode == 0, said
    assert "a worker was lost" in said
    assert [trial.number for trial in trials_of(tmp_path, *FINISHED)] == list(range(4))
    assert not trials_of(tmp_path, TrialState.FAIL)
    require_params_agree(tmp_path)


def start_slowly(study: list[str], cwd: Path) -> subprocess.Popen[str]:
    """A study in processes of its own, whose workers' steps are slow too."""
    (cwd / "sitecustomize.py").write_text(SLOW_STEPS)
    path = os.pathsep.join([str(cwd), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "finetune", *study]
    pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, start_new_session=True, **pipes
    )


def with_two_workers(
    tiny_base: Path, cwd: Path
) -> tuple[list[str], subprocess.Popen[str]]:
    """A study whose two workers train trials of many steps without a checkpoint."""
    more = (
        "hydra.sweeper.n_trials=3",
        "hydra.sweeper.n_jobs=2",
        "trainer.max_steps=100",
        "trainer.save_steps=0",
    )
    study = [*study_overrides(tiny_base, "s"), *more, "hydra/sweeper/pruner=none"]
    process = start_slowly(study, cwd)
    metrics = [
        folder_of(cwd) / "trials" / str(trial) / "metrics.jsonl" for trial in range(2)
    ]
    wait_until(lambda: all("train/loss" in read(path) for path in metrics), process)
    return study, process


def require_clean_end(cwd: Path, study: list[str], station: Station) -> None:
    """Both running trials have a checkpoint at the step where they ended, and go on from there."""
    steps = []
    for trial in range(2):
        result = result_of(cwd, trial)
        assert result["status"] == "interrupted"
        checkpoints = checkpoints_in(
            folder_of(cwd) / "trials" / str(trial) / "checkpoints"
        )
        assert [path.name for path in checkpoints] == [f"checkpoint-{result['step']}"]
        steps.append(result["step"])
    assert len(trials_of(cwd, TrialState.WAITING)) == 1, (
        "a trial has begun after the interruption"
    )
    assert not list(folder_of(cwd).glob(".stop-*"))
    ended = station.run(*study, "hydra.sweeper.n_jobs=1", cwd=cwd)
    assert ended.returncode == 0, ended.stderr
    for trial, step in enumerate(steps):
        assert f"resuming after step {step}" in read(
            folder_of(cwd) / "trials" / str(trial) / "train.log"
        )
    assert len(trials_of(cwd, TrialState.COMPLETE)) == 3


@pytest.mark.fault
@pytest.mark.parametrize(
    "everyone",
    [*further(False), True],
    ids=["the command alone", "as a terminal sends it"],
)
def test_workers_end_cleanly_when_the_study_is_interrupted(
    everyone: bool, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    study, process = with_two_workers(tiny_base, tmp_path)
    (os.killpg if everyone else os.kill)(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)

    assert process.returncode == INTERRUPTED
    assert (
        "error: interrupted; the same command with hydra.sweeper.study_name=s goes on"
        in said.splitlines()
    )
    assert "Traceback" not in said
    require_clean_end(tmp_path, study, station)


@pytest.mark.fault
def test_workers_that_still_load_are_not_started_again_after_a_signal_to_all(
    tiny_base: Path, tmp_path: Path
) -> None:
    """As a scheduler ends a job. A worker has no handler yet, and dies."""
    more = ("hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=2")
    process = start_slowly([*study_overrides(tiny_base, "s"), *more], tmp_path)

    wait_until(lambda: len(children_with("popen_loky", process.pid)) == 2, process)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=120)

    assert process.returncode == INTERRUPTED, said
    assert "goes on" in said.splitlines()[-1]
    assert "was lost" not in said
    assert not list(folder_of(tmp_path).glob(".stop-*"))


def lives(pid: int) -> bool:
    """Whether a process has not ended; one that nobody has asked for its exit code has."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.fault
def test_workers_end_cleanly_when_their_sweeper_is_killed(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    study, process = with_two_workers(tiny_base, tmp_path)
    workers = workers_of(process, tmp_path)
    process.kill()
    process.communicate(timeout=60)  # till the workers have closed it too

    # A process closes its files shortly before it has ended.
    end = time.monotonic() + 60
    while any(lives(worker) for worker in workers):
        assert time.monotonic() < end
        time.sleep(0.05)
    require_clean_end(tmp_path, study, station)
