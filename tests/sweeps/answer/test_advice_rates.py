"""Importance and advice are right as often as they say: simulations with a known truth."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import optuna
import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from support.matrix import further

from sweeps.answer.advice import _bound_lines
from sweeps.answer.importance import importances
from sweeps.answer.ranges import position

pytestmark = pytest.mark.slow

SPACE: dict[str, BaseDistribution] = {
    "rate": FloatDistribution(1e-4, 1e-2, log=True),
    "dropout": FloatDistribution(0, 0.15),
    "epochs": IntDistribution(1, 3),
    "rank": CategoricalDistribution([4, 8, 16, 32, 64]),
}

Objective = Callable[[Mapping[str, float]], float]
"""The true objective of the parameters' positions, between 0 and 1."""


def sampler(name: str, seed: int) -> BaseSampler:
    if name == "uniform":
        return RandomSampler(seed)
    # The default sampler's arguments.
    return TPESampler(seed=seed, multivariate=True, constant_liar=True)


def search(
    study: optuna.Study, objective: Objective, noise: float, trials: int, seed: int
) -> list[float]:
    """Add trials to a study and return their true objectives; measurements have noise."""
    draw = np.random.default_rng(seed)
    truth = []
    for _ in range(trials):
        trial = study.ask(SPACE)
        positions = {}
        for name, value in trial.params.items():
            positions[name] = position(SPACE[name], value)
        truth.append(objective(cast(Any, positions)))
        study.tell(trial, truth[-1] + noise * draw.normal())
    return truth


NOISE_STUDIES, MOST_TRIALS = 400, 40


@functools.cache
def studies_of_noise(sampler_name: str) -> list[optuna.Study]:
    studies = []
    for seed in range(NOISE_STUDIES):
        study = optuna.create_study(sampler=sampler(sampler_name, seed))
        search(study, lambda positions: 0.0, 1.0, MOST_TRIALS, seed)
        studies.append(study)
    return studies


def first_trials(study: optuna.Study, count: int) -> optuna.Study:
    """The study when it had so many trials."""
    earlier = optuna.create_study()
    earlier.add_trials(study.trials[:count])
    return earlier


def highest(rate: float) -> float:
    """The bound of a rate in the simulation: two standard deviations above it."""
    return rate + 2 * math.sqrt(rate * (1 - rate) / NOISE_STUDIES)


@pytest.mark.parametrize(
    ("sampler_name", "trials"),
    [("tpe", 20), *further(("uniform", 20), ("uniform", 40), ("tpe", 40))],
)
def test_of_pure_noise_nothing_is_said_to_matter(
    sampler_name: str, trials: int
) -> None:
    said = 0
    for study in studies_of_noise(sampler_name):
        said += bool(importances(first_trials(study, trials)).influences)
    assert said / NOISE_STUDIES <= highest(0.05)


@pytest.mark.parametrize("sampler_name", ["uniform", "tpe"])
def test_what_matters_is_said_to_matter(sampler_name: str) -> None:
    def objective(positions: Mapping[str, float]) -> float:
        # Of uniform trials, half of the variance each, and no noise.
        return positions["rate"] + 0.8 * positions["epochs"]

    count = 50
    said = 0
    for seed in range(count):
        study = optuna.create_study(sampler=sampler(sampler_name, seed))
        search(study, objective, 0.1, 40, seed)
        said += {"rate", "epochs"} <= set(importances(study).influences)
    assert said / count >= (0.95 if sampler_name == "uniform" else 0.6)


@pytest.mark.parametrize("trials", [40, 100])
def test_a_share_is_no_more_than_the_truth(trials: int) -> None:
    """Of uniform trials; noise has a fifth of the variance."""

    def objective(positions: Mapping[str, float]) -> float:
        return positions["rate"] + 0.5 * positions["dropout"]

    noise = math.sqrt(1.25 / 12 / 4)
    shares = []
    for seed in range(100):
        study = optuna.create_study(sampler=RandomSampler(seed))
        search(study, objective, noise, trials, seed)
        by_name = importances(study).shares
        assert by_name is not None
        shares.append([by_name["rate"], by_name["dropout"]])
    rate, dropout = np.mean(shares, axis=0)
    # The truth is 64 and 16 %; of trials that it has not seen, a model explains a little less.
    assert 0.64 - 0.12 <= rate <= 0.64 + 0.04
    assert 0.16 - 0.06 <= dropout <= 0.16 + 0.04


def bound_lines(study: optuna.Study) -> list[str]:
    ranked = sorted(study.trials, key=lambda trial: cast(float, trial.value))
    return _bound_lines(ranked)


@pytest.mark.parametrize("trials", [20, 40])
@pytest.mark.parametrize("sampler_name", ["uniform", "tpe"])
def test_bounds_of_parameters_without_influence_are_hardly_ever_pressed_against(
    sampler_name: str, trials: int
) -> None:
    counts = dict.fromkeys(SPACE, 0)
    for study in studies_of_noise(sampler_name):
        for line in bound_lines(first_trials(study, trials)):
            counts[line.partition(":")[0]] += 1
    for name, count in counts.items():
        assert count / NOISE_STUDIES <= highest(0.05), name


@pytest.mark.parametrize("sampler_name", ["uniform", "tpe"])
@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("rate", lambda at: -at["rate"] + 0.3 * (at["dropout"] - 0.5) ** 2),
        # The optimum lies beyond the bound.
        ("rate", lambda at: 1.5 * (at["rate"] - 1.2) ** 2),
        ("epochs", lambda at: -at["epochs"]),
    ],
)
def test_a_bound_that_the_objective_presses_against_is_named(
    name: str, objective: Objective, sampler_name: str
) -> None:
    count = 50
    named = 0
    for seed in range(count):
        study = optuna.create_study(sampler=sampler(sampler_name, seed))
        search(study, objective, 0.15, 40, seed)
        lines = bound_lines(study)
        named += any(
            line.startswith(name) and "upper end" in line and "extend" in line
            for line in lines
        )
    assert named / count >= 0.75
