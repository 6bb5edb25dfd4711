"""The pruners that come with the project."""

import dataclasses
import math
import random
import statistics
import time
import warnings
from typing import Any

import optuna
import pytest
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from optuna.pruners import BasePruner
from optuna.trial import TrialState, create_trial
from support.studies import PRUNERS, PRUNERS_ALLOWED, composed, settings_of

from sweeps.space.pruners import WARMUP_RUNG, CurveNoise, SuccessiveHalvingPruner
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
    study = optuna.create_study(
        direction=direction,
        pruner=SuccessiveHalvingPruner(min_survivors=1, noise_margin=0),
    )

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
        {"min_survivors": 0},
        {"min_survivors": 2.5},
        {"min_survivors": True},
        {"min_survivors": None},
        {"noise_margin": -0.1},
        {"noise_margin": math.nan},
        {"noise_margin": math.inf},
        {"noise_margin": "1"},
        {"noise_margin": None},
    ],
)
def test_halving_refuses_wrong_arguments_in_one_line(values: dict[str, Any]) -> None:
    ((name, value),) = values.items()
    with pytest.raises(ValueError, match=f"^{name}={value}: must be .*at least [012]$"):
        SuccessiveHalvingPruner(**values)


def continuing(study: optuna.Study, rung: int, values: list[float]) -> list[int]:
    """Positions of the new trials that continue, where all report a rung before one is judged."""
    trials = [study.ask() for _ in values]
    for trial, value in zip(trials, values, strict=True):
        trial.report(value, rung)
    return [
        position for position, trial in enumerate(trials) if not trial.should_prune()
    ]


@pytest.mark.parametrize(
    ("reported", "survivors"),
    [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 3),
        (5, 3),
        (6, 3),
        (9, 3),
        (11, 3),
        (12, 4),
        (30, 10),
    ],
)
def test_at_least_three_continue_at_a_rung(reported: int, survivors: int) -> None:
    pruner = SuccessiveHalvingPruner(noise_margin=0)
    study = optuna.create_study(pruner=pruner)
    values = [float(number) for number in reversed(range(reported))]
    assert continuing(study, 1, values) == [*range(reported - survivors, reported)]


@pytest.mark.parametrize(
    ("min_survivors", "continued"),
    [(1, [0, 7]), (3, [0, 1, 2, 4, 6, 7])],
)
def test_in_one_slot_a_trial_continues_that_is_among_the_best_so_far(
    min_survivors: int, continued: list[int]
) -> None:
    """One after the other: each is compared with those before it alone."""
    pruner = SuccessiveHalvingPruner(min_survivors=min_survivors, noise_margin=0)
    study = optuna.create_study(pruner=pruner)
    values = [5.0, 8.0, 6.0, 9.0, 5.5, 7.0, 5.9, 4.0]
    decisions = [continuing(study, 1, [value]) for value in values]
    assert [number for number, left in enumerate(decisions) if left] == continued


CURVES = [[3.0, 2.0, 1.0], [3.1, 2.0, 1.1], [3.0, 2.1, 1.0], [9.0, 2.0, math.nan]]
"""Absolute second differences: 0, 0.2, 0.2, and NaN; their median is 0.2."""
NOISE = 0.2 * 1.4826 / math.sqrt(6)


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize(
    ("margin", "distance", "continues"),
    [
        (1.0, 0.99 * NOISE, True),
        (1.0, 1.01 * NOISE, False),
        (2.0, 1.99 * NOISE, True),
        (2.0, 2.01 * NOISE, False),
        (0.0, 0.01 * NOISE, False),
    ],
)
def test_a_trial_continues_whose_distance_is_within_the_noise(
    direction: str, margin: float, distance: float, continues: bool
) -> None:
    sign = 1 if direction == "minimize" else -1
    pruner = SuccessiveHalvingPruner(
        min_resource=9, min_survivors=1, noise_margin=margin
    )
    study = optuna.create_study(direction=direction, pruner=pruner)
    for curve in CURVES:
        trial = study.ask()
        for rung, value in enumerate(curve, start=1):
            trial.report(sign * value, rung)
    assert continuing(study, 9, [sign * 1.0, sign * (1.0 + distance)]) == (
        [0, 1] if continues else [0]
    )


def test_without_three_values_in_a_curve_the_noise_counts_as_0() -> None:
    study = optuna.create_study()
    noise = CurveNoise()
    assert noise.deviation(study.trials) == 0
    trials = [study.ask() for _ in range(3)]
    for rung in (1, 2):
        for trial in trials:
            trial.report(float(rung * trial.number), rung)
    assert noise.deviation(study.trials) == 0
    trials[1].report(3.5, 3)
    assert noise.deviation(study.trials) == pytest.approx(0.5 * 1.4826 / math.sqrt(6))


def test_noise_of_curves_is_measured_whenever_they_were_read() -> None:
    """Normal noise on a slow decay; and values read as they come give what all at once give."""
    draw = random.Random(0)
    study = optuna.create_study()
    trials = [study.ask() for _ in range(60)]
    noise = CurveNoise()
    for rung in range(1, 28):
        for trial in trials[: 60 - 2 * rung]:
            trial.report(2 - 0.01 * rung + draw.gauss(0, 0.05), rung)
        latest = noise.deviation(study.get_trials(deepcopy=False))
    assert latest == CurveNoise().deviation(study.trials)
    assert latest == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize("values", [[math.nan], [1.0, 1.1, math.nan]])
def test_a_diverged_trial_is_pruned_whatever_the_noise(values: list[float]) -> None:
    pruner = SuccessiveHalvingPruner(noise_margin=1e9)
    study = optuna.create_study(pruner=pruner)
    trial = study.ask()
    for index, value in enumerate(values):
        trial.report(value, 3**index)
    assert trial.should_prune()


@pytest.mark.parametrize(
    ("warmup_rung", "reports", "is_pruned"),
    [
        (0, {1: 9.0}, True),
        (1, {1: 9.0}, False),  # as it re-judges between rungs
        (1, {1: 9.0, 2: 9.0}, False),  # the rung at 1 is left out, the next one is at 3
        (1, {1: 9.0, 2: 9.0, 3: 9.0}, True),
        (1, {1: 9.0, 2: 9.0, 3: 0.0}, False),
        (3, {1: 9.0, 3: 9.0, 8: 9.0}, False),
        (3, {1: 9.0, 3: 9.0, 9: 9.0}, True),
    ],
)
def test_a_rung_within_the_warmup_judges_no_trial(
    warmup_rung: int, reports: dict[int, float], is_pruned: bool
) -> None:
    study = optuna.create_study(pruner=SuccessiveHalvingPruner(noise_margin=0))
    for value in (1.0, 1.1, 1.2, 1.3):
        good = study.ask()
        for rung in (1, 2, 3, 8, 9):
            good.report(value, rung)
    trial = study.ask()
    trial.set_user_attr(WARMUP_RUNG, warmup_rung)
    for rung, value in reports.items():
        trial.report(value, rung)
    assert trial.should_prune() == is_pruned


def test_the_curves_of_1000_trials_are_read_once() -> None:
    draw = random.Random(0)
    study = optuna.create_study(pruner=SuccessiveHalvingPruner())
    curves = [
        {r: 1 / r + draw.gauss(0, 0.02) for r in range(1, 28)} for _ in range(1000)
    ]
    study.add_trials(
        [create_trial(value=1.0, intermediate_values=curve) for curve in curves]
    )
    trial = study.ask()
    durations = []
    for rung in range(1, 28):
        trial.report(1.0 / rung, rung)
        begin = time.perf_counter()
        trial.should_prune()
        durations.append(time.perf_counter() - begin)
    # The median, because other processes disturb some.
    assert statistics.median(durations) < durations[0] / 2


def test_no_pruner_ends_nothing() -> None:
    assert pruned_at("none", 5.0) is None


def test_patience_waits_while_a_trial_still_improves() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        assert pruned_at("patient", 1.9) is None
        assert pruned_at("patient", 2.4) in (2, 3, 4)


def test_hyperband_judges_at_the_rungs_of_a_study() -> None:
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
            for rung in (1, 3, 9):
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
