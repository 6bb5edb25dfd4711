"""Successive halving for trials that train together."""

import math

from optuna.pruners import BasePruner
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial


class SuccessiveHalvingPruner(BasePruner):
    """Asynchronous successive halving (ASHA, Li et al. 2018).

    At each rung, the best one of `reduction_factor` trials continues. A trial is compared with all
    trials that have reported the rung. Optuna's own pruner compares only with those that it judged
    there before, so the first of several trials that report a rung together always continues,
    however bad it is. A trial that continued can be pruned later by the same rung, as better
    trials report it: call `prune` again.

    Args:
        min_resource: the first rung at which trials are pruned.
        reduction_factor: ratio of a rung to the one before, and of trials to those that continue.
        min_early_stopping_rate: number of rungs left out at the beginning.

    Raises:
        ValueError: the arguments make no rungs.
    """

    def __init__(
        self,
        min_resource: int = 1,
        reduction_factor: int = 3,
        min_early_stopping_rate: int = 0,
    ) -> None:
        _require_at_least("min_resource", min_resource, 1)
        _require_at_least("reduction_factor", reduction_factor, 2)
        _require_at_least("min_early_stopping_rate", min_early_stopping_rate, 0)
        self._first_rung = min_resource * reduction_factor**min_early_stopping_rate
        self._reduction_factor = reduction_factor

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether a trial shall end, judged by the last rung that it has reported."""
        step = self._last_rung_step(sorted(trial.intermediate_values))
        if step is None:
            return False
        objective: float = trial.intermediate_values[step]
        if math.isnan(objective):
            return True
        ranked = _values_reported_at(step, study)
        # Where fewer trials than the factor have come so far, the best one continues.
        survivors = max(len(ranked) // self._reduction_factor, 1)
        # A trial as good as the last survivor continues too.
        if study.direction == StudyDirection.MAXIMIZE:
            return objective < ranked[-survivors]
        return objective > ranked[survivors - 1]

    def _last_rung_step(self, steps: list[int]) -> int | None:
        """Return the trial's report that counts for the last rung it has passed.

        That is the report at the rung, or the first one after it; None before the first rung.
        """
        rung = self._first_rung
        rung_step = None
        for step in steps:
            if step >= rung:
                rung_step = step
            while rung <= step:
                rung *= self._reduction_factor
        return rung_step


def _values_reported_at(step: int, study: Study) -> list[float]:
    """Return all trials' objectives at a step, NaN left out, in ascending order."""
    values = []
    for trial in study.get_trials(deepcopy=False):
        value = trial.intermediate_values.get(step, math.nan)
        if not math.isnan(value):
            values.append(value)
    return sorted(values)


def _require_at_least(name: str, value: int, minimum: int) -> None:
    if not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name}={value}: must be a whole number, at least {minimum}")
