"""Killed studies: no finished trial is lost or run twice, and the result is that of an undisturbed
study."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState
from support.commands import SLOW_STEPS, Station, wait_until
from support.configs import study_overrides
from support.matrix import further
from support.study_folder import (
    folder_of,
    metrics_of,
    read,
    require_params_agree,
    result_of,
    told,
    trials_of,
    written_at,
)

from finetune.files.run_folder import checkpoint_step, checkpoints_in
from sweeps.study.study import FINISHED


@pytest.mark.fault
@pytest.mark.parametrize(
    ("slots", "wanted"),
    [(3, 4), *further((1, 6), (1, 25), (3, 12))],
)
def test_kills_lose_nothing_and_run_nothing_twice(
    slots: int, wanted: int, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    """A study of twelve, and another where one has all its trials before its kills."""
    chance, kills, round_ = random.Random(4), 0, 0
    while kills < wanted:
        kills += kill_a_study(
            station, tiny_base, tmp_path / str(round_), chance, wanted - kills, slots
        )
        round_ += 1


def kill_a_study(
    station: Station,
    tiny_base: Path,
    place: Path,
    chance: random.Random,
    kills: int,
    slots: int,
) -> int:
    """Begin a study, kill it so often, end it, and see that all is right; returns how often it was
    killed."""
    study = [
        *study_overrides(tiny_base, "s"),
        f"hydra.sweeper.slots={slots}",
        "hydra.sweeper.n_trials=12",
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
        now = {
            trial.number: (told(trial), result_lines(place, trial))
            for trial in trials
            if trial.state in FINISHED
        }
        assert {number: now[number] for number in finished} == finished
        finished = now
    ended = station.run(*study, cwd=place)
    assert ended.returncode == 0, ended.stderr

    trials = trials_of(place, *FINISHED)
    assert [trial.number for trial in trials] == list(range(12))
    assert {
        trial.number: (told(trial), result_lines(place, trial)) for trial in trials
    }.items() >= finished.items()
    for trial in trials:
        # Its losses are the whole sessions'.
        assert trial.state != TrialState.FAIL, trial.user_attrs
        result = result_of(place, trial.number)
        assert (
            result["status"]
            == {"COMPLETE": "completed", "PRUNED": "pruned"}[trial.state.name]
        )
        assert (result["engine"], result["slots"]) == ("packed", slots)
        steps = [
            row["step"]
            for row in metrics_of(folder / "trials" / str(trial.number))
            if "train/loss" in row
        ]
        assert steps == list(range(1, result["step"] + 1)), (
            "steps were lost, or trained twice"
        )
    assert any(trial.state == TrialState.COMPLETE for trial in trials)
    require_params_agree(place)
    return killed


def result_lines(place: Path, trial: FrozenTrial) -> tuple[int, str]:
    """When and what the trial's training wrote last; test rows are seen later, by the winner and
    the baseline."""
    folder = folder_of(place) / "trials" / str(trial.number)
    training = [
        line
        for line in read(folder / "metrics.jsonl").splitlines()
        if "test/loss" not in line
    ]
    return written_at(folder / ".hydra" / "overrides.yaml"), "\n".join(training)


@pytest.mark.fault
def test_a_killed_study_is_the_study_that_was_not(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    more = (
        "hydra.sweeper.n_trials=3",
        "trainer.max_steps=24",
        "trainer.save_steps=4",
        "hydra/sweeper/pruner=none",
    )
    study = study_overrides(tiny_base, "s")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ended = station.run(*study, *more, cwd=whole)
    assert ended.returncode == 0, ended.stderr
    process = station.start(*study, *more, cwd=killed, before=SLOW_STEPS)
    adopted = folder_of(killed) / "trials" / "1"
    wait_until(
        lambda: any(
            checkpoint_step(path) >= 8
            for path in checkpoints_in(adopted / "checkpoints")
        ),
        process,
    )
    process.kill()
    assert checkpoints_in(adopted / "checkpoints"), "killed too late"
    assert not (adopted / "result.json").exists()
    log = (adopted / "train.log").read_text()

    ended = station.run(*study, *more, cwd=killed)
    assert ended.returncode == 0, ended.stderr
    assert "2 of 3 trials to go" in ended.stderr
    assert "resuming after step" in (adopted / "train.log").read_text().removeprefix(
        log
    )
    assert [told(trial) for trial in trials_of(killed)] == [
        told(trial) for trial in trials_of(whole)
    ]
    for number in range(3):
        one, other = (
            folder_of(place) / "trials" / str(number) for place in (killed, whole)
        )
        weights = Path("adapter") / "adapter_model.safetensors"
        assert (one / weights).read_bytes() == (other / weights).read_bytes()
        assert metrics_of(one) == metrics_of(other)


@pytest.mark.fault
def test_a_killed_pack_is_the_pack_that_was_not(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    """To float32's rounding: what trains beside a trial is not the same after the kill."""
    more = (
        "hydra.sweeper.n_trials=4",
        "trainer.max_steps=24",
        "trainer.save_steps=4",
        "hydra/sweeper/pruner=none",
    )
    study = [
        *study_overrides(tiny_base, "s"),
        *more,
        "hydra.sweeper.slots=3",
        "hydra/sweeper/sampler=random",
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ended = station.run(*study, cwd=whole)
    assert ended.returncode == 0, ended.stderr
    process = station.start(*study, cwd=killed, before=SLOW_STEPS)
    trials = folder_of(killed) / "trials"
    begun = [trials / str(number) for number in range(3)]
    wait_until(
        lambda: all(checkpoints_in(trial / "checkpoints") for trial in begun), process
    )
    process.kill()
    assert not any((trial / "result.json").exists() for trial in begun), (
        "killed too late"
    )

    ended = station.run(*study, cwd=killed)
    assert ended.returncode == 0, ended.stderr
    assert "4 of 4 trials to go" in ended.stderr
    for trial in begun:
        assert (trial / "train.log").read_text().count("resuming after step") == 1
    assert [trial.number for trial in trials_of(killed, TrialState.COMPLETE)] == [
        0,
        1,
        2,
        3,
    ]
    for one, other in zip(trials_of(killed), trials_of(whole), strict=True):
        assert one.params == other.params
        assert one.values == pytest.approx(other.values, rel=1e-5)
        ours, theirs = (
            metrics_of(folder_of(place) / "trials" / str(one.number))
            for place in (killed, whole)
        )
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        for row, known in zip(ours, theirs, strict=True):
            assert row.get("train/loss", 0) == pytest.approx(
                known.get("train/loss", 0), rel=1e-5
            )
