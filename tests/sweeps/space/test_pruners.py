"""The pruners that come with the project."""

import dataclasses
import math
import warnings
from typing import Any

import optuna
import pytest
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from optuna.pruners import BasePruner
from optuna.trial import TrialState
from support.studies import PRUNERS, PRUNERS_ALLOWED, composed, settings_of

from sweeps.space.pruners import SuccessiveHalvingPruner
from sweeps.space.samplers import MOVED_CLASSES, make_pruner

RUNGS = 4
FINALS = [0.9, 0.8, 0.7, 1.0, 0.95, 0.6]
"""Where the first trials end; they come down from 2 in equal steps."""


def pruned_at(pruner_name: str, final: float) -> int | None:
    """The rung at which a trial is pruned that comes after others; None where it may go on to its
    end."""
    configured = OmegaConf.to_container(
        composed(f"hydra/sweeper/pruner={pruner_name}").hydra.sweeper.pruner
    )
    pruner: BasePruner = instantiate(configured, _execution_whitelist_=PRUNERS_ALLOWED)
    study = optuna.create_study(
        study_name="s", pruner=pruner
    )  # hyperband chooses brackets by the name
    for end in (*FINALS, final):
        trial = study.ask()
        judged = None
        for rung in range(1, RUNGS + 1):
            trial.report(2 - (2 - end) * rung / RUNGS, rung)
            if trial.should_prune():
                judged = rung
                break
        study.tell(
            trial,
            None if judged else end,
            TrialState.PRUNED if judged else TrialState.COMPLETE,
        )
    return judged


@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_pruner_never_ends_the_best_trial(pruner: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        assert pruned_at(pruner, 0.3) is None


@pytest.mark.parametrize(
    "pruner", [name for name in PRUNERS if name not in ("none", "hyperband", "patient")]
)
def test_a_pruner_ends_a_hopeless_trial_at_its_first_rungs(pruner: str) -> None:
    assert pruned_at(pruner, 1.9) == 1


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_halving_compares_with_all_that_have_reported_the_rung(direction: str) -> None:
    """Optuna's own lets the first that is judged go on, and its next ones too if each is the best
    so far."""
    sign = 1 if direction == "minimize" else -1
    study = optuna.create_study(direction=direction, pruner=SuccessiveHalvingPruner())

    def left(trials: list[optuna.Trial], rung: int, values: list[float]) -> list[int]:
        for trial, value in zip(trials, values, strict=True):
            trial.report(sign * value, rung)
        return [
            number for number, trial in enumerate(trials) if not trial.should_prune()
        ]

    assert not study.ask().should_prune(), "of which nothing is known"
    trials = [study.ask() for _ in range(8)]
    values = [0.9, 0.8, 0.7, math.nan, 0.6, 0.5, 0.4, 0.3]
    assert left(trials, 1, values) == [6, 7]
    assert left(trials, 2, [*reversed(values)]) == [6, 7], (
        "no rung that judges: by the one before"
    )
    assert left(trials, 3, [*reversed(values)]) == [0, 1]
    assert left([study.ask()], 1, [0.41]) == []
    early = study.ask()
    assert left([early], 1, [0.4]) == [0]
    assert left([study.ask()], 2, [0.85]) == [], (
        "no report at the first rung: judged where it is passed"
    )
    assert left([study.ask() for _ in range(3)], 1, [0.1, 0.2, 0.05]) == [0, 1, 2]
    assert early.should_prune(), "as better ones have come to its last rung"


@pytest.mark.parametrize(
    "values",
    [
        {"min_resource": 0},
        {"reduction_factor": 1},
        {"min_early_stopping_rate": -1},
        {"min_resource": 1.5},
    ],
)
def test_halving_refuses_what_makes_no_rungs(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(ValueError, match=name):
        SuccessiveHalvingPruner(**values)


def test_no_pruner_ends_nothing() -> None:
    assert pruned_at("none", 5.0) is None


def test_patience_waits_while_a_trial_still_improves() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        assert pruned_at("patient", 1.9) is None
        assert pruned_at("patient", 2.4) in (2, 3, 4)


def test_hyperband_judges_within_four_rungs() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        configured = OmegaConf.to_container(
            composed("hydra/sweeper/pruner=hyperband").hydra.sweeper.pruner
        )
        pruner: BasePruner = instantiate(
            configured, _execution_whitelist_=PRUNERS_ALLOWED
        )
        study = optuna.create_study(study_name="s", pruner=pruner)
        pruned = 0
        for number in range(30):
            trial = study.ask()
            for rung in range(1, RUNGS + 1):
                trial.report(2.0 - (number * 7 % 10) / 10, rung)
                if trial.should_prune():
                    pruned += 1
                    study.tell(trial, state=TrialState.PRUNED)
                    break
            else:
                study.tell(trial, 2.0 - (number * 7 % 10) / 10)
    assert 5 <= pruned <= 25
    assert study.best_value == pytest.approx(1.1)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_class_path_from_before_a_move_still_makes_its_pruner(
    is_wrapped: bool,
) -> None:
    """In a user's YAML, or in a command that resumes an older study."""
    moved = {
        "_target_": "sweeps.halving.SuccessiveHalvingPruner",
        "reduction_factor": 2,
    }
    wrapper = {
        "_target_": "optuna.pruners.PatientPruner",
        "wrapped_pruner": moved,
        "patience": 1,
    }
    settings = dataclasses.replace(
        settings_of(), pruner=wrapper if is_wrapped else moved
    )

    pruner = make_pruner(settings)

    if is_wrapped:
        assert isinstance(pruner, optuna.pruners.PatientPruner)
    else:
        assert isinstance(pruner, SuccessiveHalvingPruner)


def test_every_moved_class_is_where_its_new_path_says() -> None:
    for old, new in MOVED_CLASSES.items():
        assert get_class(new).__name__ == old.rpartition(".")[2]
        with pytest.raises(ImportError):
            get_class(old)
