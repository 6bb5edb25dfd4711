"""A sampler that learns from a bounded number of trials, so that an ask of a long study is fast.

TPE's and GP's time grows with the trials that they read. TPE compares the best 25 trials with all
others, of which it weights the older ones less; so beyond `MOST_TRIALS` the oldest of the others
are left out.
"""

import heapq
from collections.abc import Sequence

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from sweeps.space.feasibility import is_feasible
from sweeps.study.wrapped_sampler import ChangedStudySampler

MOST_TRIALS = 1000
"""The latest complete and pruned trials that the sampler reads."""

BEST_TRIALS = 25
"""The best of the older ones, which it reads too: as many as TPE takes for its good trials."""


class RecentTrialsSampler(ChangedStudySampler):
    """Suggests what another sampler suggests for a study with fewer trials, of one objective."""

    def seen_trials(
        self, study: optuna.Study, trials: Sequence[FrozenTrial]
    ) -> list[FrozenTrial]:
        """Leave out the waiting trials, and old ones beyond the bounds."""
        sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1

        def cost(trial: FrozenTrial) -> float:
            assert trial.value is not None
            return sign * trial.value

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


_LEARNT = (TrialState.COMPLETE, TrialState.PRUNED)
