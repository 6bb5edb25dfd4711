"""A shared computation: one run computes, the others wait, and a failure is left to the next
run."""

from collections.abc import Generator
from typing import Any

import pytest

from finetune.engine.steps import RunSteps, drive
from finetune.run.cached import Cached
from finetune.run.shared_computation import SharedComputation


def compute(value: int, calls: list[int], steps: int = 2) -> RunSteps[int]:
    """Take a few steps, in which other runs get their turn, and return a value."""
    calls.append(value)
    for _ in range(steps):
        yield None
    return value


def fail() -> RunSteps[int]:
    yield None
    raise RuntimeError("broken")


def advance(steps: Generator[Any, Any, int]) -> int | None:
    """Let a run do one step; returns its value when it has ended."""
    try:
        next(steps)
    except StopIteration as end:
        value: int = end.value
        return value
    return None


def test_the_first_run_computes_and_no_other_run_is_behind_it() -> None:
    shared: SharedComputation[int] = SharedComputation()
    calls: list[int] = []
    runs = {
        number: shared.get(lambda number=number: compute(number, calls))  # type: ignore[misc]
        for number in (1, 2, 3)
    }

    ends: dict[int, int] = {}
    values: dict[int, int | None] = {}
    for turn in range(10):
        for number in [number for number in runs if number not in ends]:
            values[number] = advance(runs[number])
            if values[number] is not None:
                ends[number] = turn

    assert calls == [1]
    assert values == {1: 1, 2: 1, 3: 1}
    assert max(ends[2], ends[3]) <= ends[1]


def test_a_later_run_gets_the_value_at_once() -> None:
    shared: SharedComputation[int] = SharedComputation()
    calls: list[int] = []
    drive(shared.get(lambda: compute(1, calls)))

    assert advance(shared.get(lambda: compute(2, calls))) == 1
    assert calls == [1]


def test_after_a_failure_the_run_that_waited_computes() -> None:
    shared: SharedComputation[int] = SharedComputation()
    calls: list[int] = []
    first = shared.get(fail)
    second = shared.get(lambda: compute(2, calls))
    assert advance(first) is None
    assert advance(second) is None
    with pytest.raises(RuntimeError, match="broken"):
        advance(first)

    assert drive(second) == 2
    assert calls == [2]


def test_a_run_that_is_closed_while_it_computes_leaves_it_to_the_next() -> None:
    shared: SharedComputation[int] = SharedComputation()
    calls: list[int] = []
    first = shared.get(lambda: compute(1, calls))
    assert advance(first) is None
    first.close()

    assert drive(shared.get(lambda: compute(2, calls))) == 2


def test_a_cache_keeps_one_value_for_the_last_key() -> None:
    cached: Cached[str, list[str]] = Cached()
    assert cached.peek() is None
    first = cached.get("a", lambda: ["a"])

    assert cached.get("a", lambda: ["never"]) is first
    assert cached.peek() == ("a", ["a"])
    assert cached.get("b", lambda: ["b"]) == ["b"]
    assert cached.get("a", lambda: ["again"]) == ["again"]


def test_a_cache_drops_the_value_of_another_key_before_it_creates_one() -> None:
    cached: Cached[str, str] = Cached(frees_memory=False)
    cached.get("a", lambda: "a")

    def create() -> str:
        assert cached.peek() is None, "both values would be in memory at once"
        return "b"

    assert cached.get("b", create) == "b"


def test_a_cache_whose_value_could_not_be_created_is_empty() -> None:
    cached: Cached[str, str] = Cached()
    cached.get("a", lambda: "a")

    def create() -> str:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        cached.get("b", create)
    assert cached.peek() is None
