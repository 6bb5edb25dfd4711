"""Interrupted and timed-out studies: the message, the checkpoints, the continuation."""

import json
import signal
import socket
from pathlib import Path

import pytest
from optuna.trial import TrialState
from support.commands import SLOW_STEPS, Station, wait_until
from support.configs import study_overrides
from support.matrix import further
from support.study_folder import NO_END, folder_of, read, result_of, trials_of

from finetune.exit_codes import INTERRUPTED, NO_ANSWER
from finetune.files.run_folder import checkpoints_in
from sweeps.study.study import FINISHED


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_study_says_how_to_go_on_and_does(
    number: int, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    more = ("hydra.sweeper.n_trials=2", "trainer.max_steps=40", "trainer.save_steps=0")
    study = study_overrides(tiny_base, "s")
    process = station.start(*study, *more, cwd=tmp_path, before=SLOW_STEPS)
    wait_until(
        lambda: "train/loss" in read(folder_of(tmp_path) / "trials/0/metrics.jsonl"),
        process,
    )
    process.send_signal(number)
    ended = process.wait()

    assert ended.returncode == INTERRUPTED
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: interrupted; the same command with hydra.sweeper.study_name=s goes on"
    ]
    assert "Traceback" not in ended.stderr
    assert result_of(tmp_path, 0)["status"] == "interrupted"
    step = result_of(tmp_path, 0)["step"]
    ended = station.run(*study, *more, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert f"resuming after step {step}" in read(
        folder_of(tmp_path) / "trials/0/train.log"
    )
    assert len(trials_of(tmp_path, *FINISHED)) == 2


SLOW_TEST_ROWS = """
import time
import sweeps.answer.conclusion
sweeps.answer.conclusion.evaluate_finished_run = lambda *_, **__: time.sleep(60)
"""
"""The evaluation of the test rows takes a minute."""


@pytest.mark.fault
def test_an_interrupted_end_says_how_to_repeat_it(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    study = [
        *study_overrides(tiny_base, "s"),
        "hydra.sweeper.n_trials=1",
        "hydra.sweep.dir=my studies/x",
    ]
    process = station.start(*study, cwd=tmp_path, before=SLOW_TEST_ROWS)
    wait_until(lambda: "on the test rows" in process.said(), process)
    process.send_signal(signal.SIGINT)
    ended = process.wait()

    assert ended.returncode == INTERRUPTED
    assert (
        ended.stderr.splitlines()[-1]
        == "error: interrupted; python -m sweeps best 'my studies/x' takes the winner"
    )
    ended = station.run("best", "my studies/x", cwd=tmp_path, module="sweeps")
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "my studies" / "x" / "best" / "adapter").exists()


@pytest.mark.fault
def test_a_study_that_was_killed_at_its_end_leaves_no_files_of_its_workers(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    study = [
        *study_overrides(tiny_base, "s"),
        "hydra/launcher=joblib",
        "hydra.sweeper.n_jobs=2",
        "hydra.sweeper.n_trials=2",
    ]
    process = station.start(*study, cwd=tmp_path, before=SLOW_TEST_ROWS)
    folder = folder_of(tmp_path)
    wait_until(lambda: "on the test rows" in process.said(), process)
    # As if it were killed between the end of its workers and the removal of their files.
    (folder / f".worker-{socket.gethostname()}-{process.pid}-0.lock").touch()
    process.kill()

    # No trial is left to train.
    ended = station.run(*study, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert not list(folder.glob(".worker-*"))


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGTERM, *further(signal.SIGINT)])
def test_an_interrupted_pack_ends_each_trial_with_a_checkpoint(
    number: int, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    more = (
        "hydra.sweeper.n_trials=4",
        "trainer.max_steps=60",
        "trainer.save_steps=0",
        "hydra.sweeper.slots=3",
    )
    study = [*study_overrides(tiny_base, "s"), *more]
    process = station.start(*study, cwd=tmp_path, before=SLOW_STEPS)
    begun = [folder_of(tmp_path) / "trials" / str(trial) for trial in range(3)]
    wait_until(
        lambda: all("train/loss" in read(trial / "metrics.jsonl") for trial in begun),
        process,
    )
    process.send_signal(number)
    ended = process.wait()

    assert ended.returncode == INTERRUPTED
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: interrupted; the same command with hydra.sweeper.study_name=s goes on"
    ]
    assert "Traceback" not in ended.stderr
    steps = []
    for trial in begun:
        result = json.loads((trial / "result.json").read_text())
        assert result["status"] == "interrupted"
        assert [path.name for path in checkpoints_in(trial / "checkpoints")] == [
            f"checkpoint-{result['step']}"
        ]
        steps.append(result["step"])
    assert len(trials_of(tmp_path, TrialState.RUNNING)) == 3
    assert len(trials_of(tmp_path, TrialState.WAITING)) == 1, (
        "a trial has begun after the interruption"
    )
    ended = station.run(*study, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    for trial, step in zip(begun, steps, strict=True):
        assert f"resuming after step {step}" in read(trial / "train.log")
    assert [trial.number for trial in trials_of(tmp_path, *FINISHED)] == [0, 1, 2, 3]
    assert not trials_of(tmp_path, TrialState.FAIL)


AN_HOUR_PASSES = """
import time
from finetune.engine.reporter import Reporter
step, now = Reporter.report_step, time.time
def late_step(*arguments, **more):
    time.time = lambda: now() + 3600
    return step(*arguments, **more)
Reporter.report_step = late_step
"""
"""By the clock, with the first step."""


@pytest.mark.slow
def test_time_that_is_over_ends_the_study(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    more = (
        *NO_END,
        "hydra.sweeper.timeout=3600",
        "hydra.sweeper.baseline=false",
        "hydra.sweeper.n_trials=4",
    )
    ended = station.run(
        *study_overrides(tiny_base, "s"), *more, cwd=tmp_path, before=AN_HOUR_PASSES
    )
    assert ended.returncode == NO_ANSWER, ended.stderr

    (trial,) = trials_of(tmp_path, *FINISHED)
    assert trial.state == TrialState.PRUNED
    assert trial.user_attrs["reason"] == "out of time"
    assert not trials_of(tmp_path, TrialState.RUNNING)
    assert result_of(tmp_path, 0)["status"] == "pruned"


@pytest.mark.slow
def test_a_running_trial_can_be_stopped(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    more = (*NO_END, "hydra.sweeper.baseline=false", "hydra.sweeper.n_trials=1")
    process = station.start(*study_overrides(tiny_base, "s"), *more, cwd=tmp_path)
    wait_until(
        lambda: "train/loss" in read(folder_of(tmp_path) / "trials/0/metrics.jsonl"),
        process,
    )
    stopped = station.run("stop", "s", "0", cwd=tmp_path, module="sweeps")
    assert stopped.returncode == 0, stopped.stderr
    assert (
        stopped.stdout.splitlines()[-1]
        == "trial 0 stops at its next step; check with: python -m sweeps show s"
    )
    ended = process.wait()
    assert ended.returncode == NO_ANSWER, ended.stderr

    (trial,) = trials_of(tmp_path)
    assert trial.state == TrialState.PRUNED
    assert trial.user_attrs["reason"] == "told to stop"
