"""The comparison of two models on the same rows: difference, interval, chance."""

from typing import Any

import numpy as np
import pytest

from finetune.engine.evaluation import Evaluation
from sweeps.answer.compare import compare


def measured(losses: Any, tokens: list[int]) -> list[Evaluation]:
    return [
        Evaluation(tuple(row), tuple(tokens), 0.5)
        for row in np.atleast_2d(losses).tolist()
    ]


def test_equal_sides_are_equal() -> None:
    side = measured([1.0, 2.0, 3.0], [1, 1, 2])

    same = compare(side, side)

    assert (same.difference, same.low, same.high, same.chance) == (0, 0, 0, 0.5)
    assert same.verdict == "no clear difference"


def test_the_difference_is_of_a_mean_token() -> None:
    one, other = measured([1.0, 2.0], [1, 3]), measured([2.0, 4.0], [1, 3])

    found = compare(one, other)

    assert found.difference == pytest.approx((1 + 2 - 2 - 4) / 4)
    assert found.low <= found.difference <= found.high < 0
    assert (found.verdict, found.chance) == ("better", 1)
    assert compare(other, one).verdict == "worse"


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(60):
        noise = draw.normal(0.3, 1.0, size=40)
        found = compare(
            measured(noise.tolist(), [1] * 40), measured([0.0] * 40, [1] * 40)
        )
        held += found.low <= 0.3 <= found.high
    assert 51 <= held <= 60


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_few_seeds_are_not_surer_than_they_can_be(seeds: int) -> None:
    draw = np.random.default_rng(0)
    none = measured(np.zeros((seeds, 40)), [1] * 40)
    held = sure = 0
    for _ in range(200):
        noise = (
            draw.normal(0, 1, (seeds, 1))
            + draw.normal(0, 0.3, (1, 40))
            + draw.normal(0, 0.5, (seeds, 40))
        )
        found = compare(measured(noise, [1] * 40), none, max_resamples=1000)
        held += found.low <= 0 <= found.high
        sure += not 0.01 <= found.chance <= 0.99
    assert (
        held >= 182
    )  # of 200 that are equal in truth, 95 % and what three standard deviations take from them
    assert sure <= 10


def test_seeds_that_disagree_make_the_interval_wider() -> None:
    draw = np.random.default_rng(0)
    rows = draw.normal(0, 1.0, size=30)
    tokens = [1] * 30
    none = measured(np.zeros((4, 30)), tokens)
    alike = compare(measured(np.tile(rows, (4, 1)) - 0.1, tokens), none)
    apart = compare(
        measured(
            np.tile(rows, (4, 1)) - 0.1 + np.array([[-1.5], [1.5], [-1.5], [1.5]]),
            tokens,
        ),
        none,
    )

    assert apart.difference == pytest.approx(alike.difference)
    assert apart.high - apart.low > 1.5 * (alike.high - alike.low)
    assert 0.5 < apart.chance < alike.chance


def test_many_rows_are_compared_in_little_memory() -> None:
    import tracemalloc

    side, other = (
        measured(np.full(20_000, value), [1] * 20_000) for value in (1.0, 2.0)
    )
    tracemalloc.start()
    found = compare(side, other)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert found.difference == pytest.approx(-1)
    assert peak < 300e6
