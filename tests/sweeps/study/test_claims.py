"""Trials that a study queues."""

from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from support.studies import made_study

from sweeps.study.study import Study
from sweeps.study.waiting import enqueue_trials


def test_a_baseline_that_time_ended_is_tried_once_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    point = {"lora.r": 16}
    notes = {"role": "baseline", "reason": "out of time"}
    ended = optuna.trial.create_trial(
        state=TrialState.PRUNED, user_attrs=notes, system_attrs={"fixed_params": point}
    )
    study = made_study(tmp_path / "s", [ended])

    enqueue_trials(study, 2, [("baseline", point)])
    enqueue_trials(study, 2, [("baseline", point)])

    assert [trial.user_attrs.get("role") for trial in study.trials()] == [
        "baseline",
        "baseline",
    ]
    enqueue_trials(study, 3, [("baseline", point)])
    assert "role" not in study.trials()[2].user_attrs


def test_points_that_find_no_trial_are_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study = made_study(tmp_path / "s", [])
    points = [("start", {"lora.r": rank}) for rank in (4, 4, 8, 16)]

    with caplog.at_level("INFO"):
        enqueue_trials(study, 2, points)

    given = [trial.system_attrs["fixed_params"] for trial in study.trials()]
    assert given == [{"lora.r": 4}, {"lora.r": 8}]
    assert caplog.messages == [
        "1 point waits for a trial: hydra.sweeper.n_trials=3 takes it"
    ]


def test_the_storage_knows_a_trial_by_its_id_and_not_by_its_number(
    tmp_path: Path,
) -> None:
    """Where one database holds several studies."""
    address = f"sqlite:///{tmp_path / 'studies.db'}"
    optuna.create_study(study_name="first", storage=address).ask()
    trial = optuna.create_study(study_name="second", storage=address).ask()
    assert trial.number == 0

    study = Study(tmp_path, "second", address)

    assert study.trial_id(0) == 2
    assert study.storage.get_trial(study.trial_id(0)).number == 0
    study.request_stop(0)
    assert [trial.user_attrs for trial in study.trials()] == [{"stop": True}]
