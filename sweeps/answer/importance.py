"""Importance of each parameter with its uncertainty, from all measured trials, pruned ones too."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

MIN_TRIALS = 8
"""Measured trials that are needed before a share means anything."""


RESAMPLES = 20
"""Resamples whose shares give a parameter's median and its interval."""


MAX_RESAMPLE = 60
"""Largest number of trials in a resample: larger forests take longer and give the same shares."""


TREES = 8
"""Trees of the forest that is fitted to each resample."""


MeasuredTrial = tuple[FrozenTrial, float]
"""A trial and the value that it is compared by."""


@dataclass(frozen=True)
class Share:
    """Share of the objective's variation that one parameter explains."""

    share: float
    """Median of the resamples, scaled so that the shares of all parameters add up to 1."""
    low: float
    """5 % quantile of the resamples, so nine of ten lie between this and `high`."""
    high: float
    """95 % quantile of the resamples."""


def comparable_trials(study: optuna.Study, objective: int = 0) -> list[MeasuredTrial]:
    """Select the trials that can be compared, pruned ones included.

    Where pruning leaves few complete trials, all trials are compared by their values at the last
    rung that every trial has reported. With several objectives nothing is pruned, and complete
    trials are compared by their final values.

    Args:
        study: the study.
        objective: index of the objective whose values are taken.

    Returns:
        Each trial with its value; without trials whose value is not finite.
    """
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    trials = study.get_trials(deepcopy=False, states=states)
    reported = [trial for trial in trials if trial.intermediate_values]
    if len(study.directions) > 1 or not reported:
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        measured = [(trial, trial.values[objective]) for trial in complete]
    else:
        rung = _common_rung(reported)
        measured = []
        for trial in reported:
            # Rungs begin at 1: without a common one, no trial has a value at rung 0.
            value = trial.intermediate_values.get(rung, math.nan)
            measured.append((trial, value))
    return [(trial, value) for trial, value in measured if math.isfinite(value)]


def _common_rung(trials: Sequence[FrozenTrial]) -> int:
    """Return the last rung that all trials have reported, 0 if there is none."""
    rungs = [set(trial.intermediate_values) for trial in trials]
    common = set.intersection(*rungs)
    return max(common, default=0)


def importances(study: optuna.Study, objective: int = 0) -> dict[str, Share]:
    """Compute the importance of each parameter by fANOVA (Hutter et al., 2014) on resamples.

    Args:
        study: the study.
        objective: index of the objective to explain.

    Returns:
        The share of each parameter that all trials have and that varies, the largest first. Empty
        with fewer than `MIN_TRIALS` trials, or if their values are all equal.
    """
    measured = comparable_trials(study, objective)
    names = _varying_parameters([trial for trial, _ in measured])
    distinct_values = {value for _, value in measured}
    if len(measured) < MIN_TRIALS or not names or len(distinct_values) < 2:
        return {}
    shares = _resampled_shares(measured, names)
    if not shares:
        return {}
    medians = np.median(shares, axis=0)
    lows, highs = np.quantile(shares, [0.05, 0.95], axis=0)
    # The shares of one resample add up to 1; their medians need not. All may be 0.
    total = float(medians.sum()) or 1.0
    importance: dict[str, Share] = {}
    for name, median, low, high in zip(
        names,
        medians,
        lows,
        highs,
        strict=True,
    ):
        share = float(median / total)
        importance[name] = Share(share, float(low), float(high))

    def largest_first(item: tuple[str, Share]) -> float:
        _, share = item
        return -share.share

    return dict(sorted(importance.items(), key=largest_first))


def common_parameters(trials: Sequence[FrozenTrial]) -> list[str]:
    """Name the parameters that all trials have, in the first trial's order."""
    if not trials:
        return []
    names = []
    for name in trials[0].params:
        if all(name in trial.params for trial in trials):
            names.append(name)
    return names


def _varying_parameters(trials: Sequence[FrozenTrial]) -> list[str]:
    """Name the parameters that all trials have, with more than one value."""
    names = []
    for name in common_parameters(trials):
        # As text: True and 1 are equal in Python, but not in a config.
        distinct_values = {str(trial.params[name]) for trial in trials}
        if len(distinct_values) > 1:
            names.append(name)
    return names


def _resampled_shares(
    measured: Sequence[MeasuredTrial], names: Sequence[str]
) -> list[list[float]]:
    """Compute the shares on bootstrap resamples: `[resamples, parameters]`."""
    # A fixed seed: the same study gives the same shares.
    generator = random.Random(0)
    size = min(len(measured), MAX_RESAMPLE)
    shares = []
    for seed in range(RESAMPLES):
        resample = generator.choices(measured, k=size)
        study = study_of_values(resample, names)
        evaluator = optuna.importance.FanovaImportanceEvaluator(
            n_trees=TREES, seed=seed
        )
        try:
            importance = optuna.importance.get_param_importances(
                study, evaluator=evaluator, params=list(names)
            )
        except (ValueError, RuntimeError):
            # The resample has no variation to explain.
            continue
        shares.append([float(importance[name]) for name in names])
    return shares


def study_of_values(
    measured: Sequence[MeasuredTrial],
    names: Sequence[str],
    direction: StudyDirection = StudyDirection.MINIMIZE,
) -> optuna.Study:
    """Build a study in memory whose trials are complete with the values they are compared by.

    If the space changed during the study, one range that contains all values of a parameter
    replaces its ranges. A parameter that changed its type is left out.

    Args:
        measured: the trials and their values.
        names: the parameters to keep.
        direction: the direction of the new study.

    Returns:
        The study.
    """
    ranges: dict[str, BaseDistribution] = {}
    for name in names:
        trials = [trial for trial, _ in measured if name in trial.params]
        common = _common_range(trials, name)
        if common is not None:
            ranges[name] = common
    study = optuna.create_study(direction=direction)
    for trial, value in measured:
        params = {name: trial.params[name] for name in ranges if name in trial.params}
        distributions = {name: ranges[name] for name in params}
        copy = create_trial(params=params, distributions=distributions, value=value)
        study.add_trial(copy)
    return study


def _common_range(trials: Sequence[FrozenTrial], name: str) -> BaseDistribution | None:
    """Find one range that contains all of a parameter's values; None if its type changed."""
    ranges = [trial.distributions[name] for trial in trials]
    first = ranges[0]
    if all(distribution == first for distribution in ranges):
        return first
    if any(type(distribution) is not type(first) for distribution in ranges):
        return None
    values = [trial.params[name] for trial in trials]
    if isinstance(first, CategoricalDistribution):
        # Each once, in the trials' order: a set of texts has another order in each process.
        distinct_values = list(dict.fromkeys(values))
        return CategoricalDistribution(distinct_values)
    if isinstance(first, IntDistribution):
        return IntDistribution(min(values), max(values), log=first.log)
    assert isinstance(first, FloatDistribution)
    return FloatDistribution(min(values), max(values), log=first.log)
