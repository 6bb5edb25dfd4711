"""Trials that a study queues, and pruning that looks at a trial again."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from support.studies import made_study

from finetune.engine.interrupt import Interrupt
from finetune.engine.observer import Rung
from sweeps.space.pruners import SuccessiveHalvingPruner
from sweeps.study.claims import enqueue_trials
from sweeps.study.pruning import PruningObserver
from sweeps.study.study import Study


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
        "1 points wait for a trial: hydra.sweeper.n_trials=3 takes them"
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


class Judged:
    """A trial of a study, and what a worker hears of it."""

    def __init__(
        self,
        study: Study,
        pruner: Any,
        role: str = "",
        trial: optuna.Trial | None = None,
    ) -> None:
        asked = optuna.Study(study.name, study.storage, pruner=pruner)
        self.trial = (
            asked.ask()
            if trial is None
            else optuna.Trial(asked, study.trial_id(trial.number))
        )
        self.trial.set_user_attr("role", role)
        session: Any = SimpleNamespace(
            settings=SimpleNamespace(directions=["minimize"]),
            is_stopping=False,
            is_out_of_time=False,
        )
        trial_id = study.trial_id(self.trial.number)
        self.judge = PruningObserver(
            session, study, self.trial, trial_id, Interrupt(), poll_seconds=math.inf
        )

    def ends_at(self, rung: int, value: float) -> bool:
        reached = Rung(rung, 10 * rung, 90, {"objective": value})
        self.judge.on_rung(reached)
        return self.judge.should_prune(reached)

    def ends_after(self, step: int) -> bool:
        return self.judge.on_step(step)


@pytest.mark.parametrize(
    "where", ["here", "in another process", "before it was resumed"]
)
def test_a_trial_is_judged_anew_as_others_come_to_its_rung(
    where: str, tmp_path: Path
) -> None:
    study, pruner = made_study(tmp_path / "s", []), SuccessiveHalvingPruner()
    baseline, early = Judged(study, pruner, "baseline"), Judged(study, pruner)
    assert not early.ends_at(1, 2.0)
    assert not baseline.ends_at(1, 3.0)
    assert not early.ends_after(11)
    for value in (1.0, 1.1, 1.2):
        if where == "here":
            Judged(study, pruner).ends_at(1, value)
        else:
            Judged(study, pruner).trial.report(value, 1)
    if where == "in another process":
        assert not early.ends_after(12), "it has not looked"
        early.judge.poll_seconds = baseline.judge.poll_seconds = 0
    elif where == "before it was resumed":
        baseline, early = (
            Judged(study, pruner, role, own.trial)
            for role, own in (("baseline", baseline), ("", early))
        )
    assert early.ends_after(13)
    assert not baseline.ends_after(13), "it is never pruned"


def test_the_baseline_counts_where_optunas_halving_judges(tmp_path: Path) -> None:
    """Which notes who was asked, and compares with them alone."""
    study, pruner = (
        made_study(tmp_path / "s", []),
        optuna.pruners.SuccessiveHalvingPruner(min_resource=1),
    )
    assert not Judged(study, pruner, "baseline").ends_at(1, 1.0)
    assert Judged(study, pruner).ends_at(1, 2.0)
