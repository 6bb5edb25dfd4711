"""Successive halving for trials that train together and whose curves are noisy."""

import math
import statistics
from collections.abc import Sequence

from optuna.pruners import BasePruner
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial

WARMUP_RUNG = "warmup_rung"
"""User attribute of a trial: its last rung before the end of the learning rate's warm-up."""

MAD_TO_DEVIATION = 1.4826
"""Standard deviation of a normal variable, divided by the median of its absolute value."""


class SuccessiveHalvingPruner(BasePruner):
    """Asynchronous successive halving (ASHA, Li et al. 2018) that allows for noise.

    At each rung, the best one of `reduction_factor` trials continues. A trial is compared with all
    trials that have reported the rung. Optuna's own pruner compares only with those that it judged
    there before, so the first of several trials that report a rung together always continues,
    however bad it is. A trial that continued can be pruned later by the same rung, as better
    trials report it: call `prune` again.

    Two rules let more trials continue, because early values rank trials with an error:

    - At least the best `min_survivors` trials at a rung continue. In a single slot, where trials
      come to a rung one after the other, the first `min_survivors` always do.
    - A trial whose distance to the last one that continues by rank is within `noise_margin`
      standard deviations of the curves' noise continues too. The noise is estimated from all
      values reported so far; see `CurveNoise`.

    A rung that lies within a trial's warm-up (user attribute `warmup_rung`) does not judge the
    trial.

    One object judges the trials of one study, because it keeps what it has read of their curves.

    Args:
        min_resource: the first rung at which trials are pruned.
        reduction_factor: ratio of a rung to the one before, and of trials to those that continue.
        min_early_stopping_rate: number of rungs left out at the beginning.
        min_survivors: number of trials that continue at each rung, at least.
        noise_margin: distance in standard deviations of the noise; 0: ranks alone decide.

    Raises:
        ValueError: the arguments make no rungs, let no trial continue, or are no distance.
    """

    def __init__(
        self,
        min_resource: int = 1,
        reduction_factor: int = 3,
        min_early_stopping_rate: int = 0,
        min_survivors: int = 3,
        noise_margin: float = 1.0,
    ) -> None:
        _require_at_least("min_resource", min_resource, 1)
        _require_at_least("reduction_factor", reduction_factor, 2)
        _require_at_least("min_early_stopping_rate", min_early_stopping_rate, 0)
        _require_at_least("min_survivors", min_survivors, 1)
        _require_distance("noise_margin", noise_margin)
        self._first_rung = min_resource * reduction_factor**min_early_stopping_rate
        self._reduction_factor = reduction_factor
        self._min_survivors = min_survivors
        self._noise_margin = noise_margin
        self._noise = CurveNoise()

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether a trial shall end, judged by the last rung that it has reported."""
        step = self._last_rung_step(trial)
        if step is None:
            return False
        objective: float = trial.intermediate_values[step]
        if math.isnan(objective):
            return True
        # A study leaves out its trials outside the search space, which this one may be.
        trials = study.get_trials(deepcopy=False)
        others = [other for other in trials if other.number != trial.number]
        sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1
        values = [objective, *_values_at(step, others)]
        ranked_costs = sorted(sign * value for value in values)
        survivors = self._survivors(len(ranked_costs))
        margin = 0.0
        if self._noise_margin > 0:
            margin = self._noise_margin * self._noise.deviation(trials)
        # A trial as good as the last survivor continues too.
        return sign * objective > ranked_costs[survivors - 1] + margin

    def _survivors(self, reported: int) -> int:
        """Return how many trials continue by rank, of those that have reported a rung."""
        survivors = max(reported // self._reduction_factor, self._min_survivors)
        return min(survivors, reported)

    def _last_rung_step(self, trial: FrozenTrial) -> int | None:
        """Return the trial's report that counts for the last rung it has passed.

        That is the report at the rung, or the first one after it; None before the first rung.
        """
        warmup_rung = trial.user_attrs.get(WARMUP_RUNG, 0)
        rung = self._first_rung
        while rung <= warmup_rung:
            rung *= self._reduction_factor
        rung_step = None
        for step in sorted(trial.intermediate_values):
            if step >= rung:
                rung_step = step
            while rung <= step:
                rung *= self._reduction_factor
        return rung_step


class CurveNoise:
    """The noise of a study's curves: of each trial's values in the order of its rungs.

    Second differences of neighbouring values, x[t-1] - 2 x[t] + x[t+1], hardly contain the
    curve's trend. Where each value has independent noise of standard deviation s, theirs is
    s * sqrt(6). The median of their absolute values, scaled to a standard deviation, ignores
    single jumps.

    Values of a trial never change once they are reported, so only new ones are read.
    """

    def __init__(self) -> None:
        self._sorted_differences: list[float] = []
        self._read_counts: dict[int, int] = {}
        """Number of values read, by trial number."""

    def deviation(self, trials: Sequence[FrozenTrial]) -> float:
        """Return the noise's standard deviation; 0 while no curve has three values.

        Args:
            trials: all trials of the study, in any state.
        """
        for trial in trials:
            self._read(trial)
        if not self._sorted_differences:
            return 0.0
        # Fast, because only the new differences at the end are unsorted.
        self._sorted_differences.sort()
        median = statistics.median(self._sorted_differences)
        return median * MAD_TO_DEVIATION / math.sqrt(6)

    def _read(self, trial: FrozenTrial) -> None:
        """Add the differences that end at new values of a trial."""
        read_count = self._read_counts.get(trial.number, 0)
        reports = trial.intermediate_values
        if len(reports) == read_count:
            return
        self._read_counts[trial.number] = len(reports)
        values = [reports[step] for step in sorted(reports)]
        for index in range(max(read_count, 2), len(values)):
            before, middle, after = values[index - 2 : index + 1]
            difference = abs(before - 2 * middle + after)
            # Values of a diverged trial are NaN or infinite.
            if math.isfinite(difference):
                self._sorted_differences.append(difference)


def _values_at(step: int, trials: Sequence[FrozenTrial]) -> list[float]:
    """Return all trials' objectives at a step, NaN left out."""
    values = []
    for trial in trials:
        value = trial.intermediate_values.get(step, math.nan)
        if not math.isnan(value):
            values.append(value)
    return values


def _require_at_least(name: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name}={value}: must be a whole number, at least {minimum}")


def _require_distance(name: str, value: float) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}={value}: must be a number, at least 0")
