"""Gain of more trials: the study is continued with its sampler on objectives that could be true."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler

from sweeps.answer.importance import MeasuredTrial, common_parameters, study_of_values
from sweeps.answer.ranges import position
from sweeps.answer.surface_model import ObjectiveDraw, draw_objectives
from sweeps.space.user_class import make_instance

MAX_FITTED = 150
"""Largest number of trials that objectives are fitted to, the best; it takes cubic time."""


SIMULATED_TRIALS = 640
"""Trials of all simulated continuations of a study together; each takes about 2 ms."""


MIN_CONTINUATIONS = 16
MAX_CONTINUATIONS = 32
"""Least and largest number of simulated continuations."""


CLIPPED_FROM = 0.75
"""Costs above this quantile count as if they were at it: how bad bad trials are says nothing of the
best, and a few that diverged would hide all other differences."""


WORTHWHILE_SHARE = 0.1
"""A gain is worthwhile if it exceeds this share of the trials' spread (quartile to quartile)."""


MIN_PROBABILITY = 0.3
"""More trials may help if a worthwhile gain is at least as probable as this."""


DEFAULT_SAMPLER = {"_target_": "optuna.samplers.TPESampler", "multivariate": True}
"""Stands for samplers that take too long to simulate, and for those of older studies."""


@dataclass(frozen=True)
class Gain:
    """What more trials better the winner's objective by, without the luck of a measurement."""

    more: int
    """Number of further trials."""
    mean: float
    low: float
    high: float
    """`low` and `high` hold 8 of 10 simulated continuations."""
    worthwhile: float
    """A gain above this one is worthwhile."""
    probability: float
    """Share of the continuations with a worthwhile gain."""

    @property
    def may_help(self) -> bool:
        """Whether a worthwhile gain is not improbable."""
        return self.probability >= MIN_PROBABILITY


def simulate_gain(
    ranked: Sequence[MeasuredTrial], more: int, sampler: Mapping[str, Any] | None
) -> Gain | None:
    """Simulate what more trials bring.

    A Gaussian process gives objectives that could have led to the trials. On each of them the
    study's sampler continues the study, with noise. Takes 1 to 2 s for 40 trials and 40 more.

    Args:
        ranked: trials with their costs (less is better), the best first.
        more: number of further trials, at least 1.
        sampler: the study's sampler and its arguments; None: the default.

    Returns:
        The gain, in units of the objective; None if the trials have no varying parameter in common.
    """
    costs = np.array([cost for _, cost in ranked])
    first_quartile, third_quartile = np.quantile(costs, [0.25, 0.75])
    worthwhile = WORTHWHILE_SHARE * float(third_quartile - first_quartile)
    ranked = ranked[:MAX_FITTED]
    clipped = np.minimum(costs[:MAX_FITTED], np.quantile(costs, CLIPPED_FROM))
    deviation = float(clipped.std())
    if deviation == 0:
        return Gain(more, 0.0, 0.0, 0.0, worthwhile, 0.0)
    standardized = (clipped - clipped.mean()) / deviation
    trials = [trial for trial, _ in ranked]
    pairs = list(zip(trials, standardized.tolist(), strict=True))
    measured = study_of_values(pairs, common_parameters(trials))
    ranges = _varying_ranges(measured)
    if not ranges:
        return None
    # Fixed seeds: the same trials give the same gain.
    generator = np.random.default_rng(0)
    points = np.array([_encode(ranges, trial.params) for trial in measured.trials])
    count = min(max(SIMULATED_TRIALS // more, MIN_CONTINUATIONS), MAX_CONTINUATIONS)
    draws = draw_objectives(points, standardized, count, generator)
    gains = []
    for seed, draw in enumerate(draws):
        continued = optuna.create_study(sampler=_make_sampler(sampler, seed))
        continued.add_trials(measured.trials)
        gains.append(_continue(continued, ranges, draw, points, more, generator))
    scaled = np.array(gains) * deviation
    low, high = np.quantile(scaled, [0.1, 0.9])
    probability = float((scaled > worthwhile).mean())
    mean = float(scaled.mean())
    return Gain(more, mean, float(low), float(high), worthwhile, probability)


def _continue(
    study: optuna.Study,
    ranges: dict[str, BaseDistribution],
    draw: ObjectiveDraw,
    points: np.ndarray,
    more: int,
    generator: np.random.Generator,
) -> float:
    """Add trials to a study, and return what the winner's objective gains, without noise."""
    objectives = draw(points).tolist()
    first = study.best_trial.number
    for _ in range(more):
        trial = study.ask(ranges)
        point = _encode(ranges, trial.params)
        objective = float(draw(point[None])[0])
        objectives.append(objective)
        study.tell(trial, objective + draw.noise * generator.normal())
    gain: float = objectives[first] - objectives[study.best_trial.number]
    return gain


def _varying_ranges(study: optuna.Study) -> dict[str, BaseDistribution]:
    """Return the ranges of the study's parameters, but those of a single value."""
    distributions = study.trials[0].distributions
    return {name: each for name, each in distributions.items() if not each.single()}


def _encode(
    ranges: Mapping[str, BaseDistribution], params: Mapping[str, Any]
) -> np.ndarray:
    """Encode a point: positions between 0 and 1, one-hot for choices without an order."""
    columns: list[float] = []
    for name, distribution in ranges.items():
        value = params[name]
        relative_position = position(distribution, value)
        if relative_position is not None:
            columns.append(relative_position)
        elif isinstance(distribution, CategoricalDistribution):
            # By the index: True and 1 are equal in Python, but not in a config.
            chosen = int(distribution.to_internal_repr(value))
            indices = range(len(distribution.choices))
            columns += [float(index == chosen) for index in indices]
    return np.array(columns)


def _make_sampler(settings: Mapping[str, Any] | None, seed: int) -> BaseSampler:
    """Make the sampler of a continuation.

    It is the study's if that is TPE or random. QMC's points are as good as random ones here.
    """
    arguments = settings or DEFAULT_SAMPLER
    if str(arguments["_target_"]).endswith(("RandomSampler", "QMCSampler")):
        return RandomSampler(seed)
    if arguments["_target_"] != DEFAULT_SAMPLER["_target_"]:
        arguments = DEFAULT_SAMPLER
    # Trials end one after the other here. Without the liar, Optuna need not copy them all.
    arguments = {**arguments, "seed": seed, "constant_liar": False}
    sampler: BaseSampler = make_instance(
        "hydra.sweeper.sampler", arguments, BaseSampler
    )
    return sampler
