"""Halving of trials with several objectives, by non-dominated sorting."""

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from sweeps.space.dominance import count_ahead
from sweeps.space.pruners import RUNGS, SuccessiveHalvingPruner


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def rank(point: Sequence[float], points: list[Sequence[float]]) -> int:
    """The front of a point, by the longest chain of points that dominate each other."""
    better = [other for other in points if dominates(other, point)]
    return 1 + max((rank(other, better) for other in better), default=-1)


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_ahead_are_all_in_better_fronts(objectives: int) -> None:
    draw = random.Random(objectives)
    for _ in range(60):
        points = [
            tuple(draw.randrange(6) for _ in range(objectives))
            for _ in range(draw.randrange(1, 14))
        ]
        point, *others = points
        expected = sum(rank(other, points) < rank(point, points) for other in others)
        array = np.array(others, dtype=float).reshape(-1, objectives)
        assert count_ahead(np.array(point, dtype=float), array) == expected


def judged(
    others: list[list[float]],
    values: list[float],
    directions: Sequence[str] = ("minimize", "minimize"),
    **arguments: Any,
) -> bool:
    """Whether a trial with these values at its first rung is given up among others."""
    pruner = SuccessiveHalvingPruner(**{"noise_margin": 0.0, **arguments})
    study = optuna.create_study(directions=list(directions), pruner=pruner)
    for other in others:
        study.add_trial(create_trial(values=other, user_attrs={RUNGS: {"1": other}}))
    trial = study.ask()
    trial.set_user_attr(RUNGS, {"1": values})
    (frozen,) = study.get_trials(states=[TrialState.RUNNING])
    return pruner.prune(study, frozen)


FRONT = [[1.0, 9.0], [2.0, 6.0], [3.0, 4.0], [5.0, 2.0]]


@pytest.mark.parametrize(
    ("values", "is_pruned"),
    [
        ([0.5, 20.0], False),  # the best in one objective
        ([9.0, 1.0], False),
        ([2.5, 5.0], False),  # on the front, between two others
        ([3.0, 4.0], False),  # equal to one of the front
        ([3.0, 5.0], True),
        ([9.0, 9.0], True),
        ([math.nan, 1.0], True),
    ],
)
def test_a_trial_ends_when_enough_others_are_in_better_fronts(
    values: list[float], is_pruned: bool
) -> None:
    assert judged(FRONT, values) == is_pruned


def test_the_first_trials_at_a_rung_continue() -> None:
    assert not judged(FRONT[:2], [9.0, 9.0])
    assert judged(FRONT[:2], [9.0, 9.0], min_survivors=2)


def test_directions_count_for_each_objective() -> None:
    rising = [[-first, second] for first, second in FRONT]
    for values, is_pruned in (([-3.0, 5.0], True), ([3.0, 5.0], False)):
        assert judged(rising, values, ("maximize", "minimize")) == is_pruned


def test_an_objective_that_is_equal_for_all_leaves_the_other_to_decide() -> None:
    others = [[float(value), 7.0] for value in range(9)]
    for value, is_pruned in ((2.0, False), (2.5, True)):
        assert judged(others, [value, 7.0]) == is_pruned


def test_noise_of_one_objective_spares_those_that_are_close_in_it() -> None:
    """The curves' noise is that of the loss; the number of weights has none."""
    draw = random.Random(0)

    def curve(loss: float, weights: float) -> dict[str, list[float]]:
        later = {
            str(rung): [loss + draw.gauss(0, 0.1), weights] for rung in range(2, 10)
        }
        return {"1": [loss, weights], **later}

    pruner = SuccessiveHalvingPruner()
    study = optuna.create_study(directions=["minimize", "minimize"], pruner=pruner)
    for _ in range(9):
        study.add_trial(
            create_trial(values=[1.0, 10.0], user_attrs={RUNGS: curve(1.0, 10.0)})
        )
    for loss, weights, is_pruned in (
        (1.05, 10.0, False),
        (1.05, 11.0, False),
        (1.5, 10.0, True),
        (1.5, 11.0, True),
    ):
        trial = study.ask()
        trial.set_user_attr(RUNGS, {"1": [loss, weights]})
        frozen = study.get_trials()[trial.number]
        assert pruner.prune(study, frozen) == is_pruned, (loss, weights)
        study.tell(trial, state=TrialState.FAIL)


def test_trials_that_violate_a_constraint_are_no_rivals() -> None:
    """They may be better for the very reason that they are infeasible."""
    for directions in (["minimize"], ["minimize", "minimize"]):
        pruner = SuccessiveHalvingPruner(noise_margin=0.0)
        study = optuna.create_study(directions=directions, pruner=pruner)
        count = len(directions)
        trials: list[optuna.Trial] = []
        for value in (1.0, 1.1, 1.2, 1.3, 5.0):
            trial = study.ask()
            report(trial, [value] * count)
            trials.append(trial)
        last = study.get_trials()[-1]
        assert pruner.prune(study, last)
        for trial in trials[:2]:
            trial.set_constraint("adapter/parameters <= 4", 1.0)
        assert not pruner.prune(study, study.get_trials()[-1])
        assert isinstance(last, FrozenTrial)


def report(trial: optuna.Trial, values: list[float]) -> None:
    if len(values) == 1:
        trial.report(values[0], 1)
    else:
        trial.set_user_attr(RUNGS, {"1": values})


def test_both_ways_of_reporting_one_objective_are_judged_alike() -> None:
    draw = random.Random(0)
    for _, margin in itertools.product(range(30), (0.0, 1.0)):
        curves = [
            {rung: draw.randrange(8) / rung for rung in (1, 2, 3)} for _ in range(8)
        ]
        verdicts = []
        for is_reported in (True, False):
            pruner = SuccessiveHalvingPruner(noise_margin=margin)
            study = optuna.create_study()
            for curve in curves:
                rungs = {str(rung): [value] for rung, value in curve.items()}
                study.add_trial(
                    create_trial(
                        value=1.0,
                        intermediate_values=curve if is_reported else {},
                        user_attrs={} if is_reported else {RUNGS: rungs},
                    )
                )
            trials = study.get_trials()
            verdicts.append([pruner.prune(study, trial) for trial in trials])
        assert verdicts[0] == verdicts[1]
