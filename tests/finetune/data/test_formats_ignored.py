"""`dataset.ignore` leaves fields out."""

from typing import Any

import pytest
from support.conversion import convert
from support.rows import A, Q, asked, chat

ASKED = {"role": "user", "content": Q}
ANSWERED = {"role": "assistant", "content": A}
SYSTEM = {"role": "system", "content": "Be short."}
CALL = {"type": "function", "function": {"name": "count", "arguments": {}}}
TOOL = {"type": "function", "function": {"name": "count"}}


@pytest.mark.parametrize(
    ("ignore", "row", "messages"),
    [
        (["reasoning"], {"messages": [ASKED, {**ANSWERED, "reasoning_content": "r"}]}, [ASKED, ANSWERED]),
        (["reasoning"], {"messages": [ASKED, {**ANSWERED, "thinking": "r"}]}, [ASKED, ANSWERED]),
        (["reasoning"], {"messages": [ASKED, {**ANSWERED, "reasoning": "r"}]}, [ASKED, ANSWERED]),
        (["thinking"], {"messages": [ASKED, {**ANSWERED, "thinking": "r"}]}, [ASKED, ANSWERED]),
        (["tools"], {"messages": [ASKED, ANSWERED], "tools": [TOOL]}, [ASKED, ANSWERED]),
        (["system"], {"messages": [SYSTEM, ASKED, ANSWERED]}, [ASKED, ANSWERED]),
        (["system"], {"messages": [ASKED, ANSWERED], "system": "Be short."}, [ASKED, ANSWERED]),
        (["system"], {"prompt": Q, "completion": A, "system_prompt": "s"}, [ASKED, ANSWERED]),
        (["history"], {"prompt": Q, "completion": A, "history": [["a", "b"]]}, [ASKED, ANSWERED]),
        (["name"], {"messages": [{**ASKED, "name": "Ana"}, ANSWERED]}, [ASKED, ANSWERED]),
        (["mood"], {"messages": [{**ASKED, "mood": "glad"}, ANSWERED]}, [ASKED, ANSWERED]),
        (["weight"], {"messages": [ASKED, {**ANSWERED, "weight": 0.5}]}, [ASKED, ANSWERED]),
        (["train"], {"messages": [{**ASKED, "train": True}, ANSWERED]}, [ASKED, ANSWERED]),
        (
            ["tool_calls"],
            {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "4"}, ANSWERED]},
            [ASKED, ANSWERED],
        ),
        (["tool_calls"], {"messages": [ASKED, {**ANSWERED, "tool_calls": [CALL]}]}, [ASKED, ANSWERED]),
        (
            ["content"],
            {"messages": [ASKED, {**ANSWERED, "tool_calls": [CALL]}]},
            [ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
        ),
        (["score"], {"prompt": Q, "completion": A, "score": 0.5}, [ASKED, ANSWERED]),
        (["label"], {"prompt": Q, "completion": A, "label": True}, [ASKED, ANSWERED]),
        (["images"], {**chat(Q, A), "images": ["a.png"]}, [ASKED, ANSWERED]),
    ],
)  # fmt: skip
def test_an_ignored_field_is_left_out(
    ignore: list[str], row: dict[str, Any], messages: list[dict[str, Any]]
) -> None:
    assert convert(row, ignore=ignore) == [{"messages": messages}]


def test_names_of_the_common_form_may_be_ignored_where_no_row_has_them() -> None:
    assert convert(chat(Q, A), ignore=["reasoning", "tools", "history"]) == asked(Q, A)


def test_the_ignored_field_may_stand_in_any_row() -> None:
    assert (
        convert(chat(Q, A), {**chat(Q, A), "note": 1}, ignore=["note"])
        == asked(Q, A) * 2
    )


def test_the_ignored_key_may_stand_in_messages_that_are_json_text() -> None:
    text = '[{"role": "user", "content": "How many?", "mood": "glad"}, {"from": "gpt", "value": "Four."}]'
    assert convert({"messages": text}, ignore=["mood"]) == asked(Q, A)
