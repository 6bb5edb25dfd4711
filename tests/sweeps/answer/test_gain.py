"""The simulated gain of more trials, and the rule that ends a study by it."""

import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
)
from optuna.trial import FrozenTrial, TrialState, create_trial
from support.studies import made_study

from sweeps.answer.advice import advise
from sweeps.answer.gain import simulate_gain
from sweeps.answer.more_trials import no_gain

RATE = FloatDistribution(1e-4, 1e-2, log=True)
SCHEDULE = CategoricalDistribution(["constant", "linear", "cosine"])
SPACE: dict[str, BaseDistribution] = {"rate": RATE, "schedule": SCHEDULE}


def trials_of(
    objective: Callable[[Mapping[str, Any]], float],
    count: int = 24,
    space: Mapping[str, BaseDistribution] = SPACE,
) -> list[FrozenTrial]:
    draw = random.Random(0)
    trials = []
    for _ in range(count):
        params = {
            "rate": 10 ** draw.uniform(-4, -2),
            "schedule": draw.choice(SCHEDULE.choices),
        }
        chosen = {name: params[name] for name in space}
        trial = create_trial(
            params=chosen, distributions=dict(space), value=objective(params)
        )
        trials.append(trial)
    return trials


def bowl(params: Mapping[str, Any]) -> float:
    return (math.log10(params["rate"]) + 3) ** 2 + 0.01 * len(params["schedule"])


def slope(params: Mapping[str, Any]) -> float:
    """Falls the more steeply the closer the rate is to its bound."""
    return -(params["rate"] ** 2)


def equal(params: Mapping[str, Any]) -> float:
    return 1.0


def ranked(trials: list[FrozenTrial]) -> list[tuple[FrozenTrial, float]]:
    pairs = [(trial, float(trial.value or 0)) for trial in trials]
    return sorted(pairs, key=lambda pair: pair[1])


def test_where_the_best_is_almost_reached_the_gain_is_small() -> None:
    gain = simulate_gain(ranked(trials_of(bowl, count=40)), 20, None)

    assert gain is not None
    assert not gain.may_help
    assert gain.low <= gain.mean <= gain.high
    assert gain.mean < gain.worthwhile


def test_where_the_best_trials_rise_towards_a_gap_more_may_help() -> None:
    trials = [
        create_trial(
            params={"rate": 10 ** (-4 + index / 19)},
            distributions={"rate": RATE},
            value=3 - index / 19,
        )
        for index in range(20)
    ]

    gain = simulate_gain(ranked(trials), 20, None)

    assert gain is not None
    assert gain.may_help
    assert gain.mean > gain.worthwhile


def test_the_same_trials_have_the_same_gain() -> None:
    trials = ranked(trials_of(bowl))

    assert simulate_gain(trials, 5, None) == simulate_gain(trials, 5, None)


@pytest.mark.parametrize(
    "sampler",
    [
        None,
        {"_target_": "optuna.samplers.TPESampler", "n_startup_trials": 5, "seed": None},
        {"_target_": "optuna.samplers.RandomSampler", "seed": None},
        {"_target_": "optuna.samplers.QMCSampler", "seed": 1},
        {"_target_": "optuna.samplers.GPSampler", "seed": None},
        {"_target_": "hydra_plugins.hydra_optuna_sweeper.Other"},
    ],
)
def test_every_sampler_has_a_gain(sampler: dict[str, Any] | None) -> None:
    gain = simulate_gain(ranked(trials_of(bowl)), 3, sampler)

    assert gain is not None
    assert math.isfinite(gain.mean)


@pytest.mark.parametrize(
    ("trials", "has_gain"),
    [
        (trials_of(equal), True),
        (trials_of(bowl, space={"schedule": SCHEDULE}), True),
        # Nothing that could be chosen otherwise.
        (trials_of(bowl, space={}), False),
    ],
)
def test_odd_studies_raise_no_error(trials: list[FrozenTrial], has_gain: bool) -> None:
    assert (simulate_gain(ranked(trials), 3, None) is not None) == has_gain


def test_a_study_ends_where_more_trials_would_hardly_help(tmp_path: Path) -> None:
    trials = trials_of(bowl, count=40)
    mirrored = trials_of(lambda params: -bowl(params), count=40)

    minimized = no_gain(made_study(tmp_path / "less", trials))
    maximized = no_gain(
        made_study(tmp_path / "more", mirrored, "eval/accuracy", direction="maximize")
    )

    assert minimized is not None
    assert minimized.startswith("40 more trials would hardly help: eval/loss better by")
    assert maximized is not None
    assert maximized.replace("eval/accuracy", "eval/loss") == minimized


def test_failed_trials_do_not_count(tmp_path: Path) -> None:
    failed = create_trial(state=TrialState.FAIL)
    trials = trials_of(equal, count=19)

    few = made_study(tmp_path / "few", [*trials, *[failed] * 5])
    enough = made_study(tmp_path / "enough", [*trials_of(equal, count=20), failed])

    assert no_gain(few) is None
    assert no_gain(enough) is not None


def test_advice_says_that_a_study_has_ended_itself(tmp_path: Path) -> None:
    study = made_study(tmp_path / "s", trials_of(bowl, count=40))
    study.optuna.set_user_attr("total", 50)
    study.end("20 more trials would hardly help")

    assert advise(study)[0] == (
        "the study ended itself after 40 of 50 trials: 20 more trials would hardly help; "
        "hydra.sweeper.stop_when=null goes on"
    )
