"""Samplers that ask another one; what they do otherwise is for their subclasses to say."""

import functools
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from sweeps.compat import study_with_trials


class WrappedSampler(BaseSampler):
    """Does what another sampler does.

    Args:
        sampler: the other sampler.
    """

    def __init__(self, sampler: BaseSampler) -> None:
        self._sampler = sampler

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the parameters that the other sampler draws together."""
        return self._sampler.infer_relative_search_space(study, trial)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Let the other sampler prepare a trial."""
        self._sampler.before_trial(study, trial)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Let the other sampler read a trial's outcome."""
        self._sampler.after_trial(study, trial, state, values)


class ChangedStudySampler(WrappedSampler):
    """Suggests what another sampler suggests for a study of other trials.

    Only the sampler sees these: the study, its pruner and its answer do not.
    """

    @abstractmethod
    def seen_trials(
        self, study: optuna.Study, trials: Sequence[FrozenTrial]
    ) -> list[FrozenTrial]:
        """Return the trials that the other sampler sees.

        Args:
            study: the study.
            trials: all of its trials.
        """

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the parameters that the other sampler draws together."""
        changed = self._changed(study)
        return self._sampler.infer_relative_search_space(changed, trial)

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        """Draw those parameters."""
        return self._sampler.sample_relative(self._changed(study), trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draw one parameter by itself."""
        return self._sampler.sample_independent(
            self._changed(study), trial, param_name, param_distribution
        )

    def _changed(self, study: optuna.Study) -> optuna.Study:
        return study_with_trials(study, functools.partial(self.seen_trials, study))
