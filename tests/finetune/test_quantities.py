"""Counts and durations as text."""

import pytest

from finetune.quantities import counted, format_duration


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 points"), (1, "1 point"), (1200, "1,200 points")]
)
def test_a_noun_agrees_with_its_count(count: int, text: str) -> None:
    assert counted(count, "point") == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.01, "1 s"),
        (40.4, "40 s"),
        (89.4, "89 s"),
        (90, "2 min"),
        (720, "12 min"),
        (5399, "90 min"),
        (12600, "3.5 h"),
        (94680, "26.3 h"),
    ],
)
def test_a_duration_has_the_unit_that_suits_it(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
