"""A sampler that learns from a bounded number of trials, so that an ask of a long study is fast.

TPE's and GP's time grows with the trials that they read. TPE compares the best 25 trials with all
others, of which it weights the older ones less; so beyond `MOST_TRIALS` the oldest of the others
are left out.
"""

import heapq
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from sweeps.compat import study_with_fewer_trials
from sweeps.space.feasibility import is_feasible
from sweeps.study.wrapped_sampler import WrappedSampler

MOST_TRIALS = 1000
"""The latest complete and pruned trials that the sampler reads."""

BEST_TRIALS = 25
"""The best of the older ones, which it reads too: as many as TPE takes for its good trials."""


class RecentTrialsSampler(WrappedSampler):
    """Suggests what another sampler suggests for a study with fewer trials, of one objective."""

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the parameters that the other sampler draws together."""
        return self._sampler.infer_relative_search_space(_shortened(study), trial)

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        """Draw those parameters."""
        return self._sampler.sample_relative(_shortened(study), trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draw one parameter by itself."""
        return self._sampler.sample_independent(
            _shortened(study), trial, param_name, param_distribution
        )


def _shortened(study: optuna.Study) -> optuna.Study:
    """Return a study without the waiting trials, and without old ones beyond the bounds."""
    sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1

    def cost(trial: FrozenTrial) -> float:
        assert trial.value is not None
        return sign * trial.value

    def select(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        begun = [trial for trial in trials if trial.state != TrialState.WAITING]
        learnt = [trial for trial in begun if trial.state in _LEARNT]
        older = learnt[:-MOST_TRIALS]
        rivals = [
            trial
            for trial in older
            if trial.state == TrialState.COMPLETE and is_feasible(trial)
        ]
        best = {id(trial) for trial in heapq.nsmallest(BEST_TRIALS, rivals, key=cost)}
        left_out = {id(trial) for trial in older} - best
        return [trial for trial in begun if id(trial) not in left_out]

    return study_with_fewer_trials(study, select)


_LEARNT = (TrialState.COMPLETE, TrialState.PRUNED)
