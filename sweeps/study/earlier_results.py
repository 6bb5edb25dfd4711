"""A sampler that has seen the trials of earlier studies."""

from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from sweeps.compat import study_with_more_trials
from sweeps.study.wrapped_sampler import WrappedSampler


class WarmStartSampler(WrappedSampler):
    """Suggests what another sampler suggests for a study that has further trials.

    Only the sampler sees these: the study, its pruner and its answer do not have them.

    Args:
        sampler: the other sampler.
        trials: complete or pruned trials of the study's own space.
    """

    def __init__(self, sampler: BaseSampler, trials: Sequence[FrozenTrial]) -> None:
        super().__init__(sampler)
        self._trials = list(trials)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the parameters that the other sampler draws together."""
        return self._sampler.infer_relative_search_space(self._extended(study), trial)

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        """Draw those parameters."""
        return self._sampler.sample_relative(self._extended(study), trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draw one parameter by itself."""
        return self._sampler.sample_independent(
            self._extended(study), trial, param_name, param_distribution
        )

    def _extended(self, study: optuna.Study) -> optuna.Study:
        return study_with_more_trials(study, self._trials)
