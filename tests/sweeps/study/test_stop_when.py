"""A study that ends itself: what it leaves, that it stays ended, and how it goes on."""

from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState, create_trial
from support.commands import Station
from support.configs import study_overrides
from support.studies import made_study

from sweeps.study.claims import claim_trial
from sweeps.study.study import FINISHED, Study

TRIALS = 40


def search(station: Station, base: Path, cwd: Path, *overrides: str) -> Any:
    # Of a rate at which nothing is learnt, no dropout is better than another.
    flat = (
        "hydra.sweeper.params={lora.dropout: 'interval(0.0, 0.15)'}",
        "optimizer.learning_rate=1e-9",
        "hydra/sweeper/pruner=none",
        "hydra.sweeper.slots=4",
        "hydra.sweeper.baseline_seeds=0",
        "trainer.max_steps=1",
    )
    return station.run(*study_overrides(base, "s"), *flat, *overrides, cwd=cwd)


@pytest.mark.slow
def test_a_study_ends_itself_stays_ended_and_goes_on(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    no_gain = ("hydra.sweeper.stop_when=no_gain", f"hydra.sweeper.n_trials={TRIALS}")
    ended = search(station, tiny_base, tmp_path, *no_gain)
    assert ended.returncode == 0, ended.stderr
    folder = tmp_path / "outputs" / "sweeps" / "s"
    study = Study.load(folder)
    finished = len(study.finished())
    assert 20 <= finished < TRIALS
    assert len(study.trials()) == TRIALS
    assert len(study.trials(TrialState.WAITING)) == TRIALS - finished
    assert study.ended is not None
    assert f"of {TRIALS} trials: " in study.ended
    # When it happens, and in the answer's advice.
    assert ended.stderr.count(study.ended) >= 2
    assert (folder / "best" / "result.json").exists()
    assert "ended itself" in (folder / "report.html").read_text(encoding="utf-8")
    shown = station.run("show", "s", module="sweeps", cwd=tmp_path)
    assert study.ended in shown.stdout

    same = search(station, tiny_base, tmp_path, *no_gain)
    assert same.returncode == 0, same.stderr
    assert "hydra.sweeper.stop_when=null goes on" in same.stderr
    assert len(Study.load(folder).finished()) == finished

    total = finished + 1
    further = search(station, tiny_base, tmp_path, f"hydra.sweeper.n_trials={total}")
    assert further.returncode == 0, further.stderr
    resumed = Study.load(folder)
    assert len(resumed.trials(*FINISHED)) == total
    assert resumed.ended is None


def test_of_an_ended_study_only_trials_without_a_worker_are_claimed(
    tmp_path: Path,
) -> None:
    running = create_trial(state=TrialState.RUNNING)
    waiting = create_trial(state=TrialState.WAITING)
    study = made_study(tmp_path / "s", [waiting, running, waiting])
    study.end("enough")

    with claim_trial(study) as first:
        assert first is not None
        assert first.number == 1
        with claim_trial(study) as second:
            assert second is None
