"""The gain of more trials is what it is said to be: simulations with a known truth."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import optuna
import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import TPESampler

from sweeps.answer.gain import simulate_gain
from sweeps.answer.ranges import position

pytestmark = pytest.mark.slow

At = Mapping[str, float]
"""The parameters' positions, between 0 and 1; the index of a choice without an order."""

RATE = FloatDistribution(1e-4, 1e-2, log=True)
DROPOUT = FloatDistribution(0, 0.15)
RANK = CategoricalDistribution([4, 8, 16, 32, 64])
FOUR: dict[str, BaseDistribution] = {
    "rate": RATE,
    "dropout": DROPOUT,
    "epochs": IntDistribution(1, 3),
    "rank": RANK,
}
TWO: dict[str, BaseDistribution] = {"rate": RATE, "dropout": DROPOUT}
FIVE: dict[str, BaseDistribution] = {
    "rate": RATE,
    "dropout": DROPOUT,
    "decay": FloatDistribution(0, 0.1),
    "warmup": FloatDistribution(0, 0.2),
    "beta": FloatDistribution(0.9, 0.999),
}
LORA: dict[str, BaseDistribution] = {
    "rate": RATE,
    "alpha": CategoricalDistribution([8, 16, 32, 64]),
    "rank": RANK,
    "dropout": DROPOUT,
}
SCHEDULE: dict[str, BaseDistribution] = {
    "rate": RATE,
    "schedule": CategoricalDistribution(["constant", "linear", "cosine"]),
    "warmup": FloatDistribution(0, 0.2),
}


def valley(at: float, best: float = 0.6) -> float:
    """A learning rate's loss: too low a rate costs little, and too high a rate diverges."""
    if at <= best:
        return 0.6 * (best - at) ** 1.5
    return min(3.0, 12 * (at - best) ** 2)


def bowl(at: At) -> float:
    return 4 * (at["rate"] - 0.6) ** 2 + 0.3 * (at["rank"] - 0.5) ** 2


def wide_bowl(at: At, weights: tuple[float, ...], best: tuple[float, ...]) -> float:
    pairs = zip(FIVE, weights, best, strict=True)
    return sum(weight * (at[name] - where) ** 2 for name, weight, where in pairs)


def four(at: At) -> float:
    pairs = zip(FOUR, (0.7, 0.2, 0.5, 1.0), strict=True)
    return sum((at[name] - where) ** 2 for name, where in pairs)


def cliff(at: At) -> float:
    distance = at["rate"] - 0.75
    steep = 20 * distance**2 if distance > 0 else -0.5 * distance
    return 0.1 * at["dropout"] + steep


def needle(at: At) -> float:
    distance = (at["rate"] - 0.8) ** 2 + (at["dropout"] - 0.3) ** 2
    return -math.exp(-distance / 0.0288)


def lora(at: At) -> float:
    scaled_rate = at["rate"] + 0.3 * (at["alpha"] - 0.5) - 0.15 * (at["rank"] - 0.5)
    return valley(scaled_rate) + 0.03 * abs(at["rank"] - 0.6) + 0.02 * at["dropout"]


def schedule(at: At) -> float:
    cost = (0.0, 0.08, 0.03)[int(at["schedule"])]
    return valley(at["rate"] - 0.2 * at["warmup"], 0.55) + cost


Surface = tuple[dict[str, BaseDistribution], Callable[[At], float], float]

SURFACES: dict[str, Surface] = {
    "noise": (FOUR, lambda at: 0.0, 1.0),
    "bowl": (FOUR, bowl, 0.05),
    "noisy": (FOUR, bowl, 0.2),
    "bound": (FOUR, lambda at: -at["rate"] + 0.3 * (at["dropout"] - 0.5) ** 2, 0.05),
    "ridge": (
        FOUR,
        lambda at: 4 * (at["rate"] + 0.5 * at["rank"] - 0.9) ** 2 + 0.2 * at["dropout"],
        0.05,
    ),
    "four": (FOUR, four, 0.03),
    "cliff": (FOUR, cliff, 0.03),
    "needle": (FOUR, needle, 0.03),
    "two": (
        TWO,
        lambda at: 2 * (at["rate"] - 0.35) ** 2 + (at["dropout"] - 0.7) ** 2,
        0.02,
    ),
    "five": (
        FIVE,
        lambda at: wide_bowl(at, (3, 1, 0.5, 1, 2), (0.5, 0.3, 0.6, 0.8, 0.2)),
        0.05,
    ),
    "five alike": (
        FIVE,
        lambda at: wide_bowl(at, (1,) * 5, (0.4, 0.7, 0.6, 0.2, 0.5)),
        0.003,
    ),
    "lora": (LORA, lora, 0.01),
    "noisy lora": (LORA, lora, 0.04),
    "schedule": (SCHEDULE, schedule, 0.015),
}
"""Space, true objective, and the standard deviation of a measurement's noise."""


def positions(
    space: Mapping[str, BaseDistribution], params: Mapping[str, object]
) -> At:
    at = {}
    for name, value in params.items():
        relative = position(space[name], value)
        distribution = space[name]
        if relative is None:
            assert isinstance(distribution, CategoricalDistribution)
            relative = distribution.to_internal_repr(value)  # type: ignore[arg-type]
        at[name] = relative
    return at


def search(
    study: optuna.Study, surface: Surface, trials: int, seed: int
) -> list[float]:
    """Add trials to a study and return their true objectives; measurements have noise."""
    space, objective, noise = surface
    draw = np.random.default_rng(seed)
    truth = []
    for _ in range(trials):
        trial = study.ask(space)
        truth.append(objective(positions(space, trial.params)))
        study.tell(trial, truth[-1] + noise * draw.normal())
    return truth


def new_study(seed: int) -> optuna.Study:
    # The default sampler's arguments.
    sampler = TPESampler(seed=seed, multivariate=True, constant_liar=True)
    return optuna.create_study(sampler=sampler)


def true_gains(
    study: optuna.Study, truth: list[float], surface: Surface, seed: int
) -> list[float]:
    """Continue a study several times; return what each betters the winner's objective by."""
    trials = len(truth)
    first = truth[study.best_trial.number]
    gains = []
    for continuation in range(4):
        other_seed = 1_000 * (seed + 1) + continuation
        longer = new_study(other_seed)
        longer.add_trials(study.trials)
        more = search(longer, surface, trials, other_seed)
        gains.append(first - [*truth, *more][longer.best_trial.number])
    return gains


STUDIES = 4
"""Studies of each surface."""


@pytest.mark.matrix
@pytest.mark.parametrize(("trials", "right"), [(20, 0.82), (40, 0.95)])
def test_the_gain_is_within_a_factor_of_two_on_average(
    trials: int, right: float
) -> None:
    said = []
    so = []
    in_interval = []
    right_of_hardly = []
    for surface in SURFACES.values():
        for seed in range(100, 100 + STUDIES):
            study = new_study(seed)
            truth = search(study, surface, trials, seed)
            gains = true_gains(study, truth, surface, seed)
            pairs = [(trial, trial.value or 0.0) for trial in study.trials]
            ranked = sorted(pairs, key=lambda pair: pair[1])
            gain = simulate_gain(ranked, trials, None)
            assert gain is not None
            # In spreads, so that each surface counts as much.
            spread = 10 * gain.worthwhile
            said.append(gain.mean / spread)
            so.append(np.mean(gains) / spread)
            margin = 1e-9 * spread
            in_interval += [
                gain.low - margin <= each <= gain.high + margin for each in gains
            ]
            if not gain.may_help:
                right_of_hardly.append(np.mean(gains) <= gain.worthwhile)
    assert 0.5 <= np.mean(said) / np.mean(so) <= 2
    # What is said less two standard deviations of the simulation.
    assert np.mean(in_interval) >= 0.70
    share = np.mean(right_of_hardly)
    assert share >= right - 2 * math.sqrt(right * (1 - right) / len(right_of_hardly))
