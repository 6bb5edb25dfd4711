"""Messages of chats reach the common form whole."""

import pytest
from support.conversion import convert
from support.models import Row
from support.rows import A, Q, asked, chat

from finetune.data.messages import CALL_ROLES, ROLE_SYNONYMS

ASKED = {"role": "user", "content": Q}
ANSWERED = {"role": "assistant", "content": A}


def said(*turns: tuple[str, str]) -> Row:
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([{"type": "text", "text": A}], A),
        ([{"type": "text", "text": "Fo"}, {"type": "text", "text": "ur."}], A),
        ([{"type": "text", "text": A, "image_url": None}], A),
        ([{"text": A}], A),
        ([{"type": "output_text", "text": A}], A),
        ([{"type": "text", "text": A, "index": 0}], A),
    ],
    ids=["one", "joined", "null_key", "without_type", "output_text", "index"],
)
def test_parts_of_text_are_joined(content: object, expected: str) -> None:
    row = {"messages": [ASKED, {"role": "assistant", "content": content}]}
    assert convert(row) == asked(Q, expected)


@pytest.mark.parametrize("role", ["user", "system", "tool"])
@pytest.mark.parametrize("content", [None, "", []], ids=["null", "empty", "no_parts"])
def test_content_without_text_is_the_empty_text(role: str, content: object) -> None:
    [row] = convert({"messages": [{"role": role, "content": content}, ASKED, ANSWERED]})
    assert row["messages"][0] == {"role": role, "content": ""}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"reasoning_content": "Why?"}, {"reasoning_content": "Why?"}),
        ({"thinking": "Why?"}, {"thinking": "Why?"}),
        ({"reasoning": "Why?"}, {"reasoning_content": "Why?"}),
        (
            {"reasoning": "Why?", "reasoning_content": "Why?"},
            {"reasoning_content": "Why?"},
        ),
        (
            {"thinking": "a", "reasoning_content": "b"},
            {"thinking": "a", "reasoning_content": "b"},
        ),
        ({"name": "Ana"}, {"name": "Ana"}),
        ({"mood": "glad"}, {"mood": "glad"}),
        ({"tool_call_id": "c0"}, {"tool_call_id": "c0"}),
        ({"train": False}, {"train": False}),
        ({"weight": 0}, {"train": False}),
        ({"weight": 0.0}, {"train": False}),
        ({"train": True}, {}),
        ({"weight": 1}, {}),
        (
            {"reasoning_content": None, "thinking": "", "tool_calls": [], "name": None},
            {},
        ),
        ({"id": "m1", "index": 3, "type": "message"}, {}),
    ],
)
def test_a_key_of_a_message_reaches_the_common_form(fields: Row, expected: Row) -> None:
    answer, last = {**ANSWERED, **fields}, {**ANSWERED, "content": "Five."}
    [row] = convert({"messages": [ASKED, answer, ASKED, last]})
    assert row["messages"] == [ASKED, {**ANSWERED, **expected}, ASKED, last]


def test_a_user_may_carry_a_weight_of_one() -> None:
    assert convert({"messages": [{**ASKED, "weight": 1}, ANSWERED]}) == asked(Q, A)


@pytest.mark.parametrize("mark", [{"train": False}, {"weight": 0}])
def test_a_chat_of_which_no_answer_is_to_be_learnt_is_left_out(mark: Row) -> None:
    assert convert({"messages": [ASKED, {**ANSWERED, **mark}]}) == []


@pytest.mark.parametrize(
    ("word", "role"),
    [
        *ROLE_SYNONYMS.items(),
        ("Human", "user"),
        ("USER", "user"),
        (" User ", "user"),
        ("ChatGPT", "assistant"),
        ("AI", "assistant"),
        ("Model", "assistant"),
        ("System", "system"),
        ("developer", "developer"),
        ("Tool-Response", "tool"),
        ("tool response", "tool"),
    ],
)
@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
def test_another_word_for_a_role_is_that_role(
    word: str, role: str, keys: tuple[str, str]
) -> None:
    first = dict(zip(keys, (word, "Said."), strict=True))
    [row] = convert({"messages": [first, ASKED, ANSWERED]})
    assert row["messages"] == [{"role": role, "content": "Said."}, ASKED, ANSWERED]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": None, **said(("human", Q), ("gpt", A))},
        {"conversations": None, **chat(Q, A)},
        {**chat(Q, A), "tools": None, "system": None},
        {**chat(Q, A), "tools": "", "system": ""},
        {
            "messages": [
                {"role": None, "content": None, "from": "human", "value": Q},
                {"role": None, "content": None, "from": "gpt", "value": A},
            ]
        },
        {"messages": {"role": ["user", "assistant"], "content": [Q, A]}},
        {
            "messages": '[{"role": "user", "content": "How many?"}, {"from": "gpt", "value": "Four."}]'
        },
        {
            "messages": [
                {**ASKED, "from": "human", "value": Q},
                {**ANSWERED, "from": "gpt"},
            ]
        },
    ],
    ids=[
        "null_messages",
        "null_conversations",
        "null_context",
        "empty_context",
        "null_keys",
        "object_of_lists",
        "json_text",
        "both_names_of_a_key",
    ],
)
def test_a_chat_is_read_however_its_file_holds_it(row: Row) -> None:
    assert convert(row) == asked(Q, A)


def test_rows_of_one_path_may_call_their_chat_messages_or_conversations() -> None:
    assert convert(chat(Q, A), said(("human", Q), ("gpt", A))) == asked(Q, A) * 2


@pytest.mark.parametrize(
    ("row", "system"),
    [
        ({**chat(Q, A), "system": "Be short."}, "Be short."),
        ({**chat(Q, A), "system_prompt": "Be short."}, "Be short."),
        ({**said(("human", Q), ("gpt", A)), "system": "Be short."}, "Be short."),
        (
            {
                **said(("system", "Be short."), ("human", Q), ("gpt", A)),
                "system": "Be short. ",
            },
            "Be short.",
        ),
        ({**chat(Q, A), "system": None, "system_prompt": "Be short."}, "Be short."),
    ],
    ids=["messages", "system_prompt", "sharegpt", "same_twice", "second_name"],
)
def test_the_system_column_is_the_first_message(row: Row, system: str) -> None:
    [content] = convert(row)
    assert content["messages"] == [
        {"role": "system", "content": system},
        ASKED,
        ANSWERED,
    ]


def test_what_follows_the_last_answer_is_cut() -> None:
    assert convert(chat(Q, A, "And then?")) == asked(Q, A)


def test_every_role_that_holds_calls_is_an_answer() -> None:
    call = '{"name": "count", "arguments": {"of": "legs"}}'
    for role in CALL_ROLES:
        [row] = convert(said(("human", Q), (role, call)))
        assert row["messages"][-1]["role"] == "assistant"
