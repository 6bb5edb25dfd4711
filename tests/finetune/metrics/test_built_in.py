"""Built-in metrics: a table for each."""

import importlib.util
import json
from typing import Any

import pytest

from finetune.data.types import Row
from finetune.metrics import exact_match, json_valid, rouge, tool_calls
from finetune.metrics.reasoning import without_reasoning


def score(metric: Any, prediction: str, reference: str = "", **row: Any) -> Any:
    """The score of one answer."""
    return metric.score([prediction], [reference], [Row(row)])[0]


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("Paris", "Paris", 1),
        (" Paris\n", "Paris", 1),
        ("paris", "Paris", 0),
        ("Paris.", "Paris", 0),
        ("", "Paris", 0),
    ],
)
def test_exact_match(prediction: str, reference: str, expected: float) -> None:
    assert score(exact_match.METRIC, prediction, reference) == expected


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ('{"a": [1, null]}', 1),
        ("3", 1),
        ('{"a": 1', 0),
        ('{"a": NaN}', 0),
        ('Sure: {"a": 1}', 0),
        ("", 0),
        ("[" * 100_000, 0),
    ],
)
def test_json_valid(prediction: str, expected: float) -> None:
    assert score(json_valid.METRIC, prediction) == expected


CALL = {"name": "weather", "arguments": {"city": "Rome", "days": 2}}
OTHER = {"name": "time", "arguments": {}}


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        (json.dumps(CALL), 1),
        ('{"arguments": {"days": 2, "city": "Rome"}, "name": "weather"}', 1),
        (f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>", 1),
        (f"[TOOL_CALLS] [{json.dumps(CALL)}]", 1),
        ('{"name": "weather", "parameters": {"city": "Rome", "days": 2}}', 1),
        ('{"function": {"name": "weather", "arguments": "{\\"city\\": \\"Rome\\", \\"days\\": 2}"}}', 1),
        ('{"name": "weather", "arguments": {"city": "Rome", "days": "2"}}', 0),
        ('{"name": "weather", "arguments": {"city": "Rome"}}', 0),
        ('{"name": "rain", "arguments": {"city": "Rome", "days": 2}}', 0),
        (json.dumps([CALL, OTHER]), 0),
        ("It rains.", 0),
        ("{{[", 0),
    ],
)  # fmt: skip
def test_tool_calls(prediction: str, expected: float) -> None:
    reference = tool_calls.calls_text([{"type": "function", "function": CALL}])

    assert score(tool_calls.METRIC, prediction, reference) == expected


def test_several_tool_calls_have_no_order() -> None:
    reference = tool_calls.calls_text([{"function": CALL}, {"function": OTHER}])

    assert score(tool_calls.METRIC, json.dumps([OTHER, CALL]), reference) == 1


def test_an_answer_in_words_is_scored_only_where_tools_could_be_called() -> None:
    assert score(tool_calls.METRIC, "Hello.", "Hello!") is None
    assert score(tool_calls.METRIC, "Hello.", "Hello!", tools=[OTHER]) == 1
    assert score(tool_calls.METRIC, json.dumps(OTHER), "Hello!", tools=[OTHER]) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>Hm.\nYes.</think>\n\nParis", "Paris"),
        ("Hm. Yes.</think>Paris", "Paris"),
        ("<think>It never en", ""),
        ("<think>a</think>Par<think>b</think>is", "Paris"),
        ("Paris", "Paris"),
    ],
)
def test_think_blocks_are_left_out(text: str, expected: str) -> None:
    assert without_reasoning(text) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("the cat sat", "the cat sat", (1, 1, 1)),
        ("the cat", "the dog", (0.5, 0, 0.5)),
        ("cat the", "the cat", (1, 0, 0.5)),
        ("", "the cat", (0, 0, 0)),
    ],
)
def test_rouge(
    prediction: str, reference: str, expected: tuple[float, float, float]
) -> None:
    pytest.importorskip("rouge_score")

    scores = rouge.METRIC.score([prediction], [reference], [Row({})])

    assert {name: values[0] for name, values in scores.items()} == pytest.approx(
        dict(zip(rouge.NAMES, expected, strict=True))
    )


def test_rouge_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(ValueError, match=r'rouge: needs .*"qlora-sweeps\[rouge\]"'):
        rouge.require_rouge()
