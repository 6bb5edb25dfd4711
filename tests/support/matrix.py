"""Large tables of cases: a fixed part of each runs by default, all of it by `make test-matrix`."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def fixed_part(
    cases: Iterable[Any], kind: Callable[[Any], object], every: int = 4
) -> list[Any]:
    """Mark the cases of a table that need not run each time as `matrix`.

    The default part is the same in every run and holds each kind of case.

    Args:
        cases: The table, in a fixed order.
        kind: The kind of a case: cases of the same kind test the same code.
        every: Of each kind, the first case and every so many after it stay in the default part.

    Returns:
        The cases for `pytest.mark.parametrize`.
    """
    counts: dict[object, int] = {}
    marked = []
    for case in cases:
        number = counts.get(kind(case), 0)
        counts[kind(case)] = number + 1
        values = case if isinstance(case, tuple) else (case,)
        marked.append(
            pytest.param(
                *values, marks=() if number % every == 0 else pytest.mark.matrix
            )
        )
    return marked


def further(*cases: Any) -> list[Any]:
    """Mark cases as `matrix`: they are much like one that runs by default, and take long."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.matrix
        )
        for case in cases
    ]
