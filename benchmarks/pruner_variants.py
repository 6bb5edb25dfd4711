"""The pruners that `replay_pruners.py` compares."""

from collections.abc import Callable

import optuna
from optuna.pruners import BasePruner

from sweeps.space.pruners import SuccessiveHalvingPruner

MakePruner = Callable[[], BasePruner]

DEFAULT = "halving by 3, noise, three kept"
"""The pruner of the default study."""


def pruners(first: int) -> dict[str, MakePruner]:
    """Return the pruners to compare, by name.

    Args:
        first: the first rung that judges.
    """

    def halving(factor: int, survivors: int, margin: float) -> MakePruner:
        return lambda: SuccessiveHalvingPruner(
            min_resource=first,
            reduction_factor=factor,
            min_survivors=survivors,
            noise_margin=margin,
        )

    return {
        "none": optuna.pruners.NopPruner,
        "halving by 3": halving(3, 1, 0),
        "halving by 3, noise": halving(3, 1, 1),
        "halving by 3, three kept": halving(3, 3, 0),
        DEFAULT: halving(3, 3, 1),
        "halving by 3, a third of the noise, three kept": halving(3, 3, 0.33),
        "halving by 2": halving(2, 1, 0),
        "halving by 2, noise, three kept": halving(2, 3, 1),
        "Optuna's halving by 3": lambda: optuna.pruners.SuccessiveHalvingPruner(
            min_resource=first, reduction_factor=3
        ),
        "median": lambda: optuna.pruners.MedianPruner(
            n_startup_trials=4, n_warmup_steps=first - 1
        ),
        "best quarter": lambda: optuna.pruners.PercentilePruner(
            25.0, n_startup_trials=4, n_warmup_steps=first - 1
        ),
    }
