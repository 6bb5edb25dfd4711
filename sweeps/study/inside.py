"""Trials inside and outside of the search space.

The baseline's values may lie outside of the space, as a start point's may once the space has
changed. Optuna's parameters are those inside; the other values are a user attribute. Samplers,
pruners and analyses do not see such a trial, but it may have the best objective.
"""

from collections.abc import Iterable
from typing import Any

import optuna
from optuna.trial import FrozenTrial

OUTSIDE = "outside"
"""User attribute of a trial: its values that lie outside the space, by their parameters."""


def values_outside(trial: FrozenTrial | optuna.Trial) -> dict[str, Any]:
    """Return a trial's values that lie outside the space."""
    values: dict[str, Any] = trial.user_attrs.get(OUTSIDE, {})
    return values


def is_inside(trial: FrozenTrial) -> bool:
    """Whether all of a trial's values lie inside the space."""
    return not values_outside(trial)


def point_of(trial: FrozenTrial | optuna.Trial) -> dict[str, Any]:
    """Return all values of a trial, inside and outside of the space."""
    return {**trial.params, **values_outside(trial)}


def first_inside(trials: Iterable[FrozenTrial]) -> FrozenTrial | None:
    """Return the first of some trials that lies inside the space; None if there is none."""
    return next(filter(is_inside, trials), None)
