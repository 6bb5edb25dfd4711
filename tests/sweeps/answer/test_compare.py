"""The comparison of two models on the same rows: difference, interval, confidence, verdict."""

import tracemalloc

import numpy as np
import pytest
from support.evaluations import evaluation, evaluations

from sweeps.answer.compare import (
    compare_adapters,
    compare_configs,
    compare_seeds,
    metric_of,
)

ROWS = 40
TOKENS = [1] * ROWS
ZEROS = evaluation(np.zeros(ROWS), TOKENS)


def test_equal_sides_are_equal() -> None:
    side = evaluation(np.arange(ROWS), TOKENS)

    same = compare_adapters(side, side)

    assert (same.difference, same.low, same.high, same.confidence) == (0, 0, 0, 0.5)
    assert same.verdict == "no clear difference"


def test_the_difference_is_of_a_mean_token() -> None:
    tokens = [1, 3] * 30
    one = evaluation([1.0, 2.0] * 30, tokens)
    other = evaluation([2.0, 4.5] * 30, tokens)

    compared = compare_adapters(one, other)

    assert compared.difference == pytest.approx((1 + 2 - 2 - 4.5) / 4)
    assert compared.low is not None
    assert compared.high is not None
    assert compared.low <= compared.difference <= compared.high < 0
    assert compared.verdict == "better"
    assert compared.confidence == pytest.approx(1)
    assert compare_adapters(other, one).verdict == "worse"


def test_more_right_tokens_are_better() -> None:
    tokens = [4] * ROWS
    right = evaluation(np.zeros(ROWS), tokens, [3, 4] * (ROWS // 2))
    wrong = evaluation(np.zeros(ROWS), tokens, [1] * ROWS)

    compared = compare_adapters(right, wrong, "accuracy")

    assert compared.difference == pytest.approx(5 / 8)
    assert compared.verdict == "better"
    assert compared.confidence is not None
    assert compared.confidence > 0.99
    assert compare_adapters(wrong, right, "accuracy").verdict == "worse"
    assert compare_adapters(right, wrong).verdict == "no clear difference"


@pytest.mark.parametrize(
    "tokens", [[1] * 29, [1] * 200 + [400] * 5], ids=["few", "a-few-long-ones"]
)
def test_too_few_rows_get_no_interval(tokens: list[int]) -> None:
    side = evaluation(-np.ones(len(tokens)), tokens)
    other = evaluation(np.zeros(len(tokens)), tokens)

    for compared in (
        compare_adapters(side, other),
        compare_configs(side, [other, other], candidates=3),
        compare_seeds([side, side], [other, other]),
    ):
        assert (compared.low, compared.high, compared.confidence) == (None, None, None)
        assert compared.verdict == "too few rows to say"
        assert compared.difference < 0


def test_seeds_that_disagree_make_the_interval_wider() -> None:
    draw = np.random.default_rng(0)
    rows = np.tile(draw.normal(-0.1, 1.0, size=ROWS), (4, 1))
    none = evaluations(np.zeros((4, ROWS)), TOKENS)
    seeds = np.array([[-1.5], [1.5], [-1.5], [1.5]])
    alike = compare_seeds(evaluations(rows, TOKENS), none)
    apart = compare_seeds(evaluations(rows + seeds, TOKENS), none)

    assert apart.difference == pytest.approx(alike.difference)
    assert None not in (apart.high, apart.low, alike.high, alike.low)
    assert apart.high - apart.low > 1.5 * (alike.high - alike.low)  # type: ignore[operator]


def test_one_seed_is_compared_by_rows_alone() -> None:
    side = evaluation(np.random.default_rng(0).normal(size=ROWS), TOKENS)

    assert compare_seeds([side], [ZEROS]) == compare_adapters(side, ZEROS)


def test_a_config_is_less_sure_than_its_adapter_and_less_so_among_more_trials() -> None:
    draw = np.random.default_rng(0)
    side = evaluation(draw.normal(-1, 0.1, size=ROWS), TOKENS)
    baseline = evaluations(np.array([[0.0], [0.05], [-0.05]]) + np.zeros(ROWS), TOKENS)

    adapter = compare_adapters(side, baseline[0])
    among_two = compare_configs(side, baseline, candidates=1)
    among_many = compare_configs(side, baseline, candidates=39)

    assert among_many.verdict == "better"
    assert adapter.high is not None
    assert among_two.high is not None
    assert among_many.high is not None
    assert adapter.high < among_two.high < among_many.high < 0
    # Luck makes a winner look better, so the other end does not move.
    assert among_two.low == among_many.low
    by_accuracy = compare_configs(side, baseline, candidates=39, metric="accuracy")
    assert by_accuracy.verdict == "no clear difference"


@pytest.mark.parametrize(
    ("objective", "metric"),
    [
        ("eval/loss", "loss"),
        ("eval/accuracy", "accuracy"),
        ("train/loss", "loss"),
        ("time/train", "loss"),
    ],
)
def test_the_test_rows_are_compared_by_the_objectives_metric(
    objective: str, metric: str
) -> None:
    assert metric_of(objective) == metric


def test_many_rows_are_compared_in_little_memory() -> None:
    side, other = (
        evaluation(np.full(20_000, value), [1] * 20_000) for value in (1.0, 2.0)
    )
    tracemalloc.start()
    compared = compare_adapters(side, other)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert compared.difference == pytest.approx(-1)
    assert peak < 300e6
