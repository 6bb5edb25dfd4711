"""A sampler that has seen the trials of earlier studies."""

from collections.abc import Sequence

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from sweeps.study.wrapped_sampler import ChangedStudySampler


class WarmStartSampler(ChangedStudySampler):
    """Suggests what another sampler suggests for a study that has further trials.

    Args:
        sampler: the other sampler.
        trials: complete or pruned trials of the study's own space.
    """

    def __init__(self, sampler: BaseSampler, trials: Sequence[FrozenTrial]) -> None:
        super().__init__(sampler)
        self._trials = list(trials)

    def seen_trials(
        self, study: optuna.Study, trials: Sequence[FrozenTrial]
    ) -> list[FrozenTrial]:
        """Add the earlier ones."""
        return [*self._trials, *trials]
