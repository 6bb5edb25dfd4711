"""Tool calls and tool schemas reach the common form, however a data set writes them."""

import json
from typing import Any

import pytest
from support.conversion import convert
from support.models import Row
from support.rows import A, Q

ASKED = {"role": "user", "content": Q}
ANSWERED = {"role": "assistant", "content": A}
ARGUMENTS = {"of": "legs"}
FUNCTION = {"name": "count", "arguments": ARGUMENTS}
CALL = {"type": "function", "function": FUNCTION}
SCHEMA = {
    "name": "count",
    "description": "Counts things",
    "parameters": {"type": "object", "properties": {"of": {"type": "string"}}},
}
TOOL = {"type": "function", "function": SCHEMA}


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([CALL], [CALL]),
        ([{**CALL, "id": "c0"}], [{**CALL, "id": "c0"}]),
        ([{**CALL, "id": None, "index": 0}], [CALL]),
        ([{"function": FUNCTION}], [CALL]),
        ([FUNCTION], [CALL]),
        (CALL, [CALL]),
        ([{"name": "count", "parameters": ARGUMENTS}], [CALL]),
        ([{"function": {"name": "count", "arguments": json.dumps(ARGUMENTS)}}], [CALL]),
        (
            [{"function": {"name": "count", "arguments": {**ARGUMENTS, "in": None}}}],
            [CALL],
        ),
        (json.dumps([CALL]), [CALL]),
        ([CALL, CALL], [CALL, CALL]),
        (
            [{"name": "count", "arguments": ""}],
            [{**CALL, "function": {"name": "count", "arguments": {}}}],
        ),
        (
            [{"name": "count"}],
            [{**CALL, "function": {"name": "count", "arguments": {}}}],
        ),
    ],
    ids=[
        "whole",
        "id",
        "null_id",
        "without_type",
        "bare",
        "one",
        "parameters",
        "json_arguments",
        "null_argument",
        "json_calls",
        "two",
        "empty_arguments",
        "no_arguments",
    ],
)
@pytest.mark.parametrize("content", ["", None, "I count."])
def test_a_call_is_an_answer_with_arguments_as_an_object(
    calls: Any, expected: list[Row], content: str | None
) -> None:
    answer = {"role": "assistant", "content": content, "tool_calls": calls}
    [row] = convert({"messages": [ASKED, answer]})
    answer = {"role": "assistant", "content": content or "", "tool_calls": expected}
    assert row == {"messages": [ASKED, answer]}


def test_a_call_needs_no_content() -> None:
    [row] = convert({"messages": [ASKED, {"role": "assistant", "tool_calls": [CALL]}]})
    assert row["messages"][1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [CALL],
    }


def test_the_function_call_of_old_files_is_a_call_and_its_answer_of_role_tool() -> None:
    turns = [
        ASKED,
        {
            "role": "assistant",
            "content": None,
            "function_call": {**FUNCTION, "arguments": "{}"},
        },
        {"role": "function", "name": "count", "content": "4"},
        ANSWERED,
    ]
    [row] = convert({"messages": turns})
    call = {"type": "function", "function": {"name": "count", "arguments": {}}}
    assert row["messages"][1:3] == [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4", "name": "count"},
    ]


@pytest.mark.parametrize("role", ["function_call", "tool_call", "Function_Call"])
@pytest.mark.parametrize(
    ("value", "calls"),
    [
        (json.dumps(FUNCTION), [CALL]),
        (json.dumps([FUNCTION, FUNCTION]), [CALL, CALL]),
        (json.dumps({**FUNCTION, "arguments": json.dumps(ARGUMENTS)}), [CALL]),
        (json.dumps(CALL), [CALL]),
        (FUNCTION, [CALL]),
    ],
    ids=["one", "two", "json_arguments", "whole", "object"],
)
@pytest.mark.parametrize("answer_role", ["observation", "tool", "tool_response"])
def test_sharegpt_calls_and_their_answers(
    role: str, value: Any, calls: list[Row], answer_role: str
) -> None:
    turns = [("human", Q), (role, value), (answer_role, "4"), ("gpt", A)]
    [row] = convert({"conversations": [{"from": f, "value": v} for f, v in turns]})
    assert row["messages"] == [
        ASKED,
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "4"},
        ANSWERED,
    ]


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ([TOOL], [TOOL]),
        ([SCHEMA], [TOOL]),
        (json.dumps([TOOL]), [TOOL]),
        (json.dumps([SCHEMA, TOOL]), [TOOL, TOOL]),
        ([json.dumps(SCHEMA)], [TOOL]),
        (TOOL, [TOOL]),
        ([{"type": "function", **SCHEMA}], [TOOL]),
        ([{**SCHEMA, "strict": None}], [TOOL]),
    ],
    ids=[
        "whole",
        "bare",
        "json",
        "json_mixed",
        "json_items",
        "one",
        "flat",
        "null_key",
    ],
)
@pytest.mark.parametrize("column", ["tools", "functions"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, ANSWERED]},
        {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]},
        {"prompt": Q, "completion": A},
        {"prompt": [ASKED], "completion": [ANSWERED]},
        {"instruction": Q, "output": A},
    ],
    ids=["messages", "sharegpt", "prompt", "prompt_lists", "alpaca"],
)
def test_tools_stand_in_the_row(
    tools: Any, expected: list[Row], column: str, row: Row
) -> None:
    assert convert({**row, column: tools}) == [
        {"messages": [ASKED, ANSWERED], "tools": expected}
    ]


@pytest.mark.parametrize("tools", [None, [], "", "[]", "null"])
def test_no_tools_leave_no_trace(tools: Any) -> None:
    assert convert({"messages": [ASKED, ANSWERED], "tools": tools}) == [
        {"messages": [ASKED, ANSWERED]}
    ]
