"""How much each parameter mattered, and how sure that is, from all trials that were measured, pruned ones too."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

LEAST = 8
"""Trials needed before a share means anything."""


RESAMPLES = 20


MOST = 60
"""Trials in a resample at most: forests of more take long and say the same."""


TREES = 8


@dataclass(frozen=True)
class Share:
    """What part of the objective's variation a parameter explains."""

    share: float
    """Median of the resamples, scaled so that all shares add up to 1."""
    low: float
    """Nine of ten resamples lie between this and `high`."""
    high: float


def comparable_trials(study: optuna.Study, objective: int = 0) -> list[tuple[FrozenTrial, float]]:
    """Trials that can be compared, each with its value.

    Complete ones would be few where much is pruned, so each trial counts with its value at the last rung that all of
    them reported. Of several objectives, whose trials are not pruned, complete trials count with one of their values.
    """
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    if len(study.directions) > 1 or not any(trial.intermediate_values for trial in trials):
        pairs = [(trial, trial.values[objective]) for trial in trials if trial.state == TrialState.COMPLETE]
    else:
        reported = [trial for trial in trials if trial.intermediate_values]
        rung = max(set.intersection(*(set(trial.intermediate_values) for trial in reported)), default=0)
        pairs = [(trial, trial.intermediate_values.get(rung, math.nan)) for trial in reported]
    return [(trial, value) for trial, value in pairs if math.isfinite(value)]


def importances(study: optuna.Study, objective: int = 0) -> dict[str, Share]:
    """Each parameter's share by fANOVA (Hutter et al., 2014) on resamples, the largest first; none of small studies."""
    pairs = comparable_trials(study, objective)
    names = [
        name
        for name in (pairs[0][0].params if pairs else ())
        if all(name in trial.params for trial, _ in pairs) and len({str(trial.params[name]) for trial, _ in pairs}) > 1
    ]
    if len(pairs) < LEAST or not names or len({value for _, value in pairs}) < 2:
        return {}
    draw, found = random.Random(0), []
    for seed in range(RESAMPLES):
        drawn = draw.choices(pairs, k=min(len(pairs), MOST))
        copy = study_of_values(drawn, names)
        forest = optuna.importance.FanovaImportanceEvaluator(n_trees=TREES, seed=seed)
        try:
            shares = optuna.importance.get_param_importances(copy, evaluator=forest, params=names)
        except (ValueError, RuntimeError):  # the resample has no variation to explain
            continue
        found.append([float(shares[name]) for name in names])
    if not found:
        return {}
    median = np.median(found, axis=0)
    low, high = np.quantile(found, [0.05, 0.95], axis=0)
    whole = float(median.sum()) or 1.0
    shares_of = zip(names, median / whole, low, high, strict=True)
    made = {name: Share(float(share), float(less), float(more)) for name, share, less, more in shares_of}
    return dict(sorted(made.items(), key=lambda item: -item[1].share))


def study_of_values(
    pairs: Sequence[tuple[FrozenTrial, float]],
    names: Sequence[str],
    direction: StudyDirection = StudyDirection.MINIMIZE,
) -> optuna.Study:
    """A study in memory in which each trial is complete with the value that it is compared by.

    Where the space was changed on the way, all trials stand in one that holds them all; a parameter that was once a
    choice and once a range is left out.
    """
    spans = {name: _span([trial for trial, _ in pairs if name in trial.params], name) for name in names}
    known = {name: span for name, span in spans.items() if span is not None}
    copy = optuna.create_study(direction=direction)
    copy.add_trials(
        [
            create_trial(
                params={name: trial.params[name] for name in known if name in trial.params},
                distributions={name: span for name, span in known.items() if name in trial.params},
                value=value,
            )
            for trial, value in pairs
        ]
    )
    return copy


def _span(trials: Sequence[FrozenTrial], name: str) -> BaseDistribution | None:
    """One distribution that holds all values that a parameter has had; None where they are of several kinds."""
    seen = [trial.distributions[name] for trial in trials]
    first = seen[0]
    if all(other == first for other in seen):
        return first
    if any(type(other) is not type(first) for other in seen):
        return None
    if isinstance(first, CategoricalDistribution):
        return CategoricalDistribution(list(dict.fromkeys(trial.params[name] for trial in trials)))
    low, high = (end(trial.params[name] for trial in trials) for end in (min, max))
    if isinstance(first, IntDistribution):
        return IntDistribution(low, high, log=first.log)
    assert isinstance(first, FloatDistribution)
    return FloatDistribution(low, high, log=first.log)
