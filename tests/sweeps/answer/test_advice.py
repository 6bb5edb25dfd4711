"""The advice of a report: bounds to widen, more trials, and when it gives none."""

import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState, create_trial
from support.studies import COMPLETE, PRUNED, made_study, made_unchecked, trial

from sweeps.answer.advice import advise


def test_advice_names_the_bound_that_the_best_press_against(tmp_path: Path) -> None:
    draw = random.Random(0)
    study = made_study(
        tmp_path / "s",
        [trial(draw, COMPLETE if number % 2 else PRUNED) for number in range(40)],
    )
    lines = advise(study)

    pressed = r"optimizer\.learning_rate: \d+ of the best 13 trials are at the upper end of .*, but \d+ of all 40; extend it to 0\.03"
    assert re.match(pressed, lines[0])
    assert lines[0].endswith("(measured at rung 1 of 4)")


def pressed(
    folder: Path, what: BaseDistribution, best: object, other: object
) -> list[str]:
    """The advice on the bounds of a parameter whose best ten trials of forty are at one place."""
    return pressed_by(folder, what, [best] * 10 + [other] * 30)


def pressed_by(
    folder: Path, what: BaseDistribution, values: Sequence[object]
) -> list[str]:
    """The advice on the bounds of a parameter with these values, of the best trial first."""
    trials = [
        create_trial(
            params={"x.y": value}, distributions={"x.y": what}, value=float(index)
        )
        for index, value in enumerate(values)
    ]
    lines = advise(made_study(folder, trials))
    return [line for line in lines if line.startswith("x.y")]


@pytest.mark.parametrize(
    ("what", "best", "other", "beyond"),
    [
        (
            CategoricalDistribution([1, 2, 4, 8]),
            1,
            8,
            None,
        ),  # rows in a batch: there is no half
        (CategoricalDistribution([1, 2, 4, 8]), 8, 1, "16"),
        (CategoricalDistribution([0.0, 0.01, 0.1]), 0.0, 0.1, None),
        (IntDistribution(1, 8), 1, 8, None),
        (IntDistribution(1, 8), 8, 1, "12"),
        (IntDistribution(4, 64, log=True), 4, 64, "1"),
        (FloatDistribution(0, 0.15), 0.0, 0.15, None),
        (FloatDistribution(0, 0.15), 0.15, 0.0, "0.225"),
        (
            FloatDistribution(0.9, 0.998),
            0.998,
            0.9,
            "0.999",
        ),  # a share, as Adam's beta: 1 is none
        (FloatDistribution(1e-4, 1e-2, log=True), 1e-4, 1e-2, "3.33e-05"),
    ],
)
def test_what_lies_beyond_a_bound_can_be_searched(
    what: BaseDistribution,
    best: object,
    other: object,
    beyond: str | None,
    tmp_path: Path,
) -> None:
    lines = pressed(tmp_path / "s", what, best, other)

    assert [line.partition("extend it to ")[2] for line in lines] == (
        [beyond] if beyond else []
    )


def test_advice_knows_the_range_that_is_searched_now(tmp_path: Path) -> None:
    draw = random.Random(0)
    trials = [
        trial(draw, params={"optimizer.learning_rate": 0.0099}) for _ in range(12)
    ]
    trials += [trial(draw, params={"optimizer.learning_rate": 2e-4}) for _ in range(12)]
    for each in trials[12:]:
        each._distributions["optimizer.learning_rate"] = FloatDistribution(
            1e-4, 1, log=True
        )

    lines = advise(made_unchecked(tmp_path / "s", trials))

    assert not [line for line in lines if line.startswith("optimizer.learning_rate")]


@pytest.mark.parametrize("exponents", [2, 1])
def test_more_trials_would_hardly_help_where_nothing_is_left_to_find(
    exponents: int, tmp_path: Path
) -> None:
    """The loss falls with the rate. The range ends at 1e-2, a half is not searched at all."""
    draw = random.Random(0)
    rates = [10 ** (-4 + exponents * index / 19) for index in range(20)]
    trials = [trial(draw, params={"optimizer.learning_rate": rate}) for rate in rates]

    line = advise(made_study(tmp_path / "s", trials))[-1]

    verdict = "would hardly help" if exponents == 2 else "may help"
    numbers = r"-?[\d.e-]+"
    interval = rf"{numbers} to {numbers} in 8 of 10 simulated continuations"
    assert re.match(
        rf"20 more trials {verdict}: eval/loss better by {numbers} on average \({interval}; "
        rf"a tenth of the trials' spread is {numbers}\)",
        line,
    )
    assert line.endswith("continue with hydra.sweeper.n_trials=40") == (exponents == 1)


def test_luck_is_no_reason_for_more_trials(tmp_path: Path) -> None:
    hopeful = 0
    for seed in range(6):
        draw = random.Random(seed)
        losses = [draw.gauss(3, 0.1) for _ in range(24)]
        trials = [
            trial(draw, value=loss, intermediate_values={1: loss}) for loss in losses
        ]
        hopeful += "may help" in advise(made_study(tmp_path / str(seed), trials))[-1]

    assert hopeful <= 2


def test_advice_asks_for_trials_that_the_study_can_have(tmp_path: Path) -> None:
    draw = random.Random(0)
    rates = [10 ** (-4 + index / 19) for index in range(20)]
    trials = [trial(draw, params={"optimizer.learning_rate": rate}) for rate in rates]
    full = advise(made_study(tmp_path / "full", trials))
    begun = advise(
        made_study(
            tmp_path / "begun",
            [*trials, *[create_trial(state=TrialState.WAITING)] * 10],
        )
    )
    trials[0].user_attrs["role"] = "grid"
    grid = advise(made_study(tmp_path / "grid", trials))

    assert full[-1].endswith("continue with hydra.sweeper.n_trials=40")
    assert begun[-1].endswith("continue with hydra.sweeper.n_trials=30")
    assert not [line for line in grid if "more trials" in line]


def test_few_trials_give_no_advice(tmp_path: Path) -> None:
    draw = random.Random(0)
    assert advise(made_study(tmp_path / "s", [trial(draw) for _ in range(7)])) == []


def test_whether_more_trials_help_is_not_said_from_few(tmp_path: Path) -> None:
    draw = random.Random(0)
    study = made_study(tmp_path / "s", [trial(draw) for _ in range(19)])

    assert advise(study)[-1] == (
        "whether more trials would help is not known from 19 trials (needs 20)"
    )


def test_where_all_trials_crowd_at_a_bound_the_best_do_not_press_against_it(
    tmp_path: Path,
) -> None:
    """As TPE's do: 30 of 40 are there, and of the best as many as of all."""
    values = [1e-2, 1e-2, 1e-2, 1e-3] * 10

    lines = pressed_by(tmp_path / "s", FloatDistribution(1e-4, 1e-2, log=True), values)

    assert lines == []
