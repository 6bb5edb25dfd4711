"""Successive halving for trials that train together and whose curves are noisy."""

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from optuna.pruners import BasePruner
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial

from sweeps.space.dominance import count_ahead
from sweeps.space.feasibility import is_feasible

WARMUP_RUNG = "warmup_rung"
"""User attribute of a trial: its last rung before the end of the learning rate's warm-up."""

RUNGS = "rungs"
"""User attribute of a trial with several objectives: their values by rung, as text for JSON.

Optuna takes no reports of such a trial.
"""

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

    With several objectives trials are ranked by non-dominated sorting: a trial is given up when the
    fronts better than its own hold as many trials as continue. A trial that no other dominates
    always continues. Trials that violate a constraint are no rivals.

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
        self._noise: list[CurveNoise] = []

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether a trial shall end, judged by the last rung that it has reported."""
        step = self._last_rung_step(trial)
        if step is None:
            return False
        signs = np.array([_sign(direction) for direction in study.directions])
        costs = signs * np.array(rung_values(trial)[step])
        if np.isnan(costs).any():
            return True
        # A study leaves out its trials outside the search space, which this one may be.
        trials = study.get_trials(deepcopy=False)
        others = [other for other in trials if other.number != trial.number]
        other_costs = signs * _values_at(step, others, len(signs))
        survivors = self._survivors(1 + len(other_costs))
        if self._noise_margin > 0:
            noise = [each.deviation(trials) for each in self._noise_of(len(signs))]
            costs = costs - self._noise_margin * np.array(noise)
        # A trial as good as the last survivor continues too.
        return count_ahead(costs, other_costs) >= survivors

    def _noise_of(self, objectives: int) -> "list[CurveNoise]":
        while len(self._noise) < objectives:
            self._noise.append(CurveNoise(len(self._noise)))
        return self._noise

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
        for step in sorted(rung_values(trial)):
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

    Args:
        objective: index of the objective whose curves are read.
    """

    def __init__(self, objective: int = 0) -> None:
        self._objective = objective
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
        # Most trials have nothing new, and a study may have thousands.
        if len(trial.user_attrs.get(RUNGS) or trial.intermediate_values) == read_count:
            return
        reports = rung_values(trial)
        self._read_counts[trial.number] = len(reports)
        values = [reports[step][self._objective] for step in sorted(reports)]
        for index in range(max(read_count, 2), len(values)):
            before, middle, after = values[index - 2 : index + 1]
            difference = abs(before - 2 * middle + after)
            # Values of a diverged trial are NaN or infinite.
            if math.isfinite(difference):
                self._sorted_differences.append(difference)


def rung_values(trial: FrozenTrial) -> dict[int, list[float]]:
    """Return the objectives that a trial has reported, by rung."""
    several: Mapping[str, list[float]] = trial.user_attrs.get(RUNGS, {})
    if several:
        return {int(rung): values for rung, values in several.items()}
    return {rung: [value] for rung, value in trial.intermediate_values.items()}


def _values_at(step: int, trials: Sequence[FrozenTrial], objectives: int) -> np.ndarray:
    """Return the objectives at a step of all trials that can win, without those with a NaN."""
    values = []
    for trial in trials:
        reported = _values_of(trial, step)
        if reported is None or any(map(math.isnan, reported)):
            continue
        # An infeasible trial can't win: that it is better says nothing against another.
        if is_feasible(trial):
            values.append(reported)
    return np.array(values).reshape(-1, objectives)


def _values_of(trial: FrozenTrial, step: int) -> Sequence[float] | None:
    """Return the objectives that a trial has reported at a step, without reading all others."""
    several: Mapping[str, list[float]] | None = trial.user_attrs.get(RUNGS)
    if several:
        return several.get(str(step))
    value = trial.intermediate_values.get(step)
    return None if value is None else [value]


def _sign(direction: StudyDirection) -> int:
    return -1 if direction == StudyDirection.MAXIMIZE else 1


def _require_at_least(name: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name}={value}: must be a whole number, at least {minimum}")


def _require_distance(name: str, value: float) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}={value}: must be a number, at least 0")
