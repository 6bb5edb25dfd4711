"""Whether an answer calls the tools that the row's answer calls, with the same arguments."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from finetune.data.types import Row, canonical_text
from finetune.metrics.metric import Metric


def calls_text(calls: Sequence[dict[str, Any]]) -> str:
    """Return tool calls of a row in the common form as text, which `_calls_in` reads."""
    return json.dumps([call["function"] for call in calls], ensure_ascii=False)


def _score(
    predictions: Sequence[str], references: Sequence[str], rows: Sequence[Row]
) -> list[float | None]:
    scores: list[float | None] = []
    for prediction, reference, row in zip(predictions, references, rows, strict=True):
        expected = _calls_in(reference)
        # An answer without a call counts only where the model could have called a tool.
        if not expected and not row.get("tools"):
            scores.append(None)
        else:
            scores.append(float(_calls_in(prediction) == expected))
    return scores


def _calls_in(text: str) -> list[str]:
    """Return the calls in a text, whatever a template writes around them.

    Each is canonical JSON, so that the order of an object's keys does not count. They are sorted,
    because the calls of one answer have no order.
    """
    return sorted(canonical_text(call) for call in _find_calls(text))


def _find_calls(text: str) -> Iterator[tuple[str, Any]]:
    decoder = json.JSONDecoder()
    position = 0
    while position < len(text):
        if text[position] not in "{[":
            position += 1
            continue
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            position += 1
            continue
        for item in value if isinstance(value, list) else [value]:
            yield from _call_of(item)


def _call_of(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the name and the arguments of a call; nothing where a value is none."""
    if not isinstance(value, dict):
        return
    function = value.get("function", value)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return
    if "arguments" in function or "parameters" in function:
        yield function["name"], arguments


METRIC = Metric("tool_calls", ("tool_calls",), _score)
