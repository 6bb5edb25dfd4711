"""Where the points of trials come from."""

import optuna
from optuna.trial import FrozenTrial

ADDED = "added"
"""The role of a trial that a user has added by hand, in addition to those of `n_trials`."""

GRID = "grid"
"""The role of a trial whose point belongs to a grid, and of a job of a plain multirun."""


def role(trial: FrozenTrial | optuna.Trial) -> str:
    """Return where a trial's point comes from; empty: the sampler.

    It is one of baseline, start, warm_start, grid and added.
    """
    return str(trial.user_attrs.get("role", ""))
