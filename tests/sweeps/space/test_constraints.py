"""Constraints: how they are written, and what of a trial they are about."""

import math
import sys

import pytest

from finetune.errors import ConfigError
from sweeps.space.constraints import parse_constraint, require_names, violations


@pytest.mark.parametrize(
    ("text", "met", "violated"),
    [
        ("adapter/parameters <= 2e6", [0, 2e6], [2e6 + 1, math.inf, math.nan]),
        ("adapter/parameters<=2e6", [2e6], [2e6 + 1]),
        ("  eval/accuracy >= 0.5 ", [0.5, 1], [0.4999, -1, math.nan]),
        ("eval/loss < 1.5", [1.4999999999], [1.5, 2]),
        ("eval/loss > -1", [-0.9999999], [-1, -2]),
        ("eval/my-set/exact_match >= .25", [0.25], [0.2]),
    ],
)
def test_a_bound_is_met_or_violated(
    text: str, met: list[float], violated: list[float]
) -> None:
    constraint = parse_constraint(text)
    assert constraint.text == text.strip()
    for value in met:
        assert constraint.violation(value) <= 0, value
    for value in violated:
        distance = constraint.violation(value)
        assert 0 < distance <= sys.float_info.max, value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "adapter/parameters",
        "adapter/parameters <=",
        "<= 5",
        "adapter/parameters == 5",
        "adapter/parameters <= two",
        "adapter/parameters <= nan",
        "adapter/parameters <= inf",
        "1 <= adapter/parameters <= 5",
        "adapter/parameters <= 5 and eval/loss < 1",
        "__import__('os').system('true') <= 1",
        "adapter/parameters <= 5; 1",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        require_names([parse_constraint(text)], ["adapter/parameters", "eval/loss"])
    line = str(refused.value)
    assert line.startswith(f"hydra.sweeper.constraints={text}")
    assert "NAME <= NUMBER" in line or "allowed: " in line


def test_an_unknown_name_is_refused_with_what_is_allowed() -> None:
    constraint = parse_constraint("adapter/parameter <= 5")
    with pytest.raises(ConfigError) as refused:
        require_names([constraint], ["eval/loss", "adapter/parameters"])
    line = str(refused.value)
    assert line.startswith("hydra.sweeper.constraints=adapter/parameter <= 5: did you ")
    assert "mean adapter/parameters?" in line
    assert "peak_memory_bytes" in line
    for name in ("eval/loss", "train_tokens"):
        require_names([parse_constraint(f"{name} <= 5")], ["eval/loss"])


def test_a_figure_that_a_result_lacks_violates_its_bound() -> None:
    constraints = [parse_constraint("a <= 1"), parse_constraint("b >= 1")]
    figures = {"a": 3, "b": None}
    assert violations(constraints, figures, is_final=False) == {"a <= 1": 2}
    assert violations(constraints, figures, is_final=True) == {
        "a <= 1": 2,
        "b >= 1": sys.float_info.max,
    }
