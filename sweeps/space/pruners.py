"""Successive halving for trials that train together."""

import math

from optuna.pruners import BasePruner
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial


class SuccessiveHalvingPruner(BasePruner):
    """Asynchronous successive halving (ASHA, Li et al. 2018): of `reduction_factor` trials at a rung one goes on.

    A trial is compared with all that have reported the rung. Optuna's own compares with those that were judged there
    before, so that of trials which report a rung at the same time the first always goes on, however bad it is. And a
    trial that went on is judged by its rung again whenever this is asked, as others come to it that do better.

    `min_resource` is the first rung that judges; the next ones are `reduction_factor` times as far.
    `min_early_stopping_rate` leaves out so many of them. Raises ValueError for values that make no rungs.
    """

    def __init__(self, min_resource: int = 1, reduction_factor: int = 3, min_early_stopping_rate: int = 0) -> None:
        for name, value, least in (
            ("min_resource", min_resource, 1),
            ("reduction_factor", reduction_factor, 2),
            ("min_early_stopping_rate", min_early_stopping_rate, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value}: must be a whole number, at least {least}")
        self._first, self._factor = min_resource * reduction_factor**min_early_stopping_rate, reduction_factor

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether the trial shall end, by the rung that it has passed last."""
        step = self._passed(sorted(trial.intermediate_values))
        if step is None:
            return False
        own: float = trial.intermediate_values[step]
        if math.isnan(own):
            return True
        reported = [other.intermediate_values.get(step, math.nan) for other in study.get_trials(deepcopy=False)]
        ranked: list[float] = sorted(value for value in reported if not math.isnan(value))
        kept = max(len(ranked) // self._factor, 1)
        return own < ranked[-kept] if study.direction == StudyDirection.MAXIMIZE else own > ranked[kept - 1]

    def _passed(self, steps: list[int]) -> int | None:
        """The last of a trial's reports that is at a rung which judges, or the first one after it."""
        rung, passed = self._first, None
        for step in steps:
            if step >= rung:
                passed = step
            while rung <= step:
                rung *= self._factor
        return passed
