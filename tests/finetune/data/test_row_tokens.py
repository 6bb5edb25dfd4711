"""Rows that hold tokens of the chat template themselves, names, and marks that the config denies."""

from typing import Any

import pytest
from support.rows import A, Q, Settings, chat, tokenize

from finetune.data.encoding import IGNORED, Encoder
from finetune.data.types import Prompt
from finetune.errors import ConfigError

pytestmark = pytest.mark.usefixtures("fresh_cache")

END = "<|im_end|>"
PROMPT = f"<|im_start|>user\n{Q}{END}\n<|im_start|>assistant\n"
CALL = {"type": "function", "function": {"name": "find", "arguments": {"n": 1}}}
DROPS_REASONING = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if loop.last and m.reasoning_content -%}{{- m.reasoning_content + '\n' -}}{%- endif -%}"
    "{{- m.content + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
"""Writes the reasoning of a last answer alone."""


def learnt(row: dict[str, Any], tokenizer: Any, loss_on: str = "assistant") -> str:
    examples = Encoder(tokenizer, loss_on=loss_on).encode(row).examples
    labels = [label for example in examples for label in example.labels]
    return str(tokenizer.decode([label for label in labels if label != IGNORED]))


@pytest.mark.parametrize("written", [f"{A}{END}", f"{A}{END}\n", f"{A}<|endoftext|>"])
def test_an_answer_that_has_its_end_gets_no_second_one(
    tokenizer: Any, written: str
) -> None:
    tokenizer.eos_token = "<|endoftext|>"
    row = chat(Q, written, Q, written)
    assert learnt(row, tokenizer) == f"{A}{END}\n" * 2


def test_an_end_inside_of_an_answer_stays(tokenizer: Any) -> None:
    text = f"{END} ends it."
    assert learnt(chat(Q, text), tokenizer) == f"{text}{END}\n"


@pytest.mark.parametrize(
    ("contents", "is_noted"),
    [
        ((PROMPT, f"{A}{END}"), True),
        ((Q, f"{PROMPT}{A}"), True),
        ((Q, f"{A}{END}"), False),
        ((f"What is {END}?", f"{END} ends a turn."), False),
        ((Q, A), False),
    ],
)
def test_texts_that_are_rendered_again_are_said(
    tokenizer: Any, settings: Settings, contents: tuple[str, str], is_noted: bool
) -> None:
    rows = [chat(Q, A), chat(*contents)]
    notes = tokenize("train", rows, tokenizer, settings()).report.notes
    line = "messages hold tokens that begin turns (first in rows: row 2): "
    line += "texts that are rendered already are rendered again"
    assert (line in notes) is is_noted
    assert is_noted or not any("rendered" in note for note in notes)


@pytest.mark.parametrize(
    ("role", "is_noted"), [("user", True), ("assistant", True), ("tool", False)]
)
def test_names_that_the_template_does_not_write_are_said(
    tokenizer: Any, settings: Settings, role: str, is_noted: bool
) -> None:
    messages = chat(Q, A)["messages"]
    tool = {"role": "tool", "content": "5"}
    row = {"messages": [*messages, tool, messages[1]]}
    row["messages"] = [
        {**message, "name": "Ana"} if message["role"] == role else message
        for message in row["messages"]
    ]
    line = "fields of messages that the chat template does not use: name"
    notes = tokenize("train", [row], tokenizer, settings()).report.notes
    assert (line in notes) is is_noted
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "(message.name or '') + message['content']"
    )
    assert line not in tokenize("train", [row], tokenizer, settings()).report.notes


def test_every_token_is_learnt_but_not_of_a_row_that_marks_context(
    tokenizer: Any,
) -> None:
    row = chat(Q, A, Q, A)
    assert A in learnt(row, tokenizer, "all")
    row["messages"][1]["train"] = False
    with pytest.raises(ConfigError, match=r"loss_on=all.*message 2 is context"):
        learnt(row, tokenizer, "all")


def test_what_every_token_lacks_of_earlier_answers_is_counted(tokenizer: Any) -> None:
    tokenizer.chat_template = DROPS_REASONING
    row = chat(Q, A, Q, A)
    row["messages"][1]["reasoning_content"] = "First."
    row["messages"][3]["reasoning_content"] = "Second."
    encoded = Encoder(tokenizer, loss_on="all").encode(row)
    assert encoded.unlearnt.total() == 1
    assert Encoder(tokenizer).encode(row).unlearnt.total() == 0


@pytest.mark.parametrize(
    ("fields", "tools", "reason"),
    [
        (
            {"reasoning_content": "R."},
            None,
            r"reasoning would need.*ignore=\[reasoning\]",
        ),
        ({"thinking": "R."}, None, r"reasoning would need.*ignore=\[reasoning\]"),
        ({"tool_calls": [CALL], "content": ""}, None, r"ignore=\[tool_calls\]"),
        ({"tool_calls": [CALL]}, [CALL], r"ignore=\[tools,tool_calls\]"),
        ({}, [CALL], r"tools would need.*ignore=\[tools\]"),
    ],
)
def test_without_a_template_what_is_not_text_is_refused(
    tokenizer: Any, fields: dict[str, Any], tools: list[Any] | None, reason: str
) -> None:
    tokenizer.chat_template = None
    row = chat(Q, A)
    row["messages"][1] |= fields
    if tools:
        row["tools"] = tools
    with pytest.raises(ConfigError, match=rf"model.chat_template=null: .*{reason}"):
        Encoder(tokenizer).encode(row)


def turns(*roles: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": role.upper()} for role in roles]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (Prompt("Hi"), "Hi"),
        (Prompt("Hi", "Be brief."), "Be brief.\n\nHi"),
        (Prompt("USER", messages=turns("user")), "USER"),
        (Prompt("USER", messages=turns("system", "user")), "SYSTEM\n\nUSER"),
        # The prompt of a row whose question is a system turn.
        (Prompt("SYSTEM", messages=turns("system")), "SYSTEM"),
    ],
)
def test_without_a_template_a_prompt_is_its_question_after_its_system_turn(
    tokenizer: Any, prompt: Prompt, text: str
) -> None:
    tokenizer.chat_template = None
    ids = Encoder(tokenizer).encode_prompt(prompt)
    assert ids == tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (Prompt("Hi", tools=[CALL]), "tools would need"),
        (
            Prompt("USER", messages=turns("user", "assistant", "user")),
            "a prompt has the turns user, assistant, user; a prompt may be one user turn",
        ),
        (
            Prompt("USER", messages=turns("user", "user")),
            "a prompt has the turns user, user; ",
        ),
        (Prompt("ASSISTANT", messages=turns("assistant")), "the turns assistant; "),
    ],
)
def test_without_a_template_a_prompt_of_more_turns_is_refused(
    tokenizer: Any, prompt: Prompt, reason: str
) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=rf"^model.chat_template=null: .*{reason}"):
        Encoder(tokenizer).encode_prompt(prompt)


@pytest.mark.parametrize("roles", [("assistant",), ("assistant", "assistant")])
def test_without_a_template_a_chat_without_a_question_is_refused(
    tokenizer: Any, roles: tuple[str, ...]
) -> None:
    tokenizer.chat_template = None
    messages = [{"role": role, "content": A} for role in roles]
    with pytest.raises(ConfigError, match="do not begin with a question"):
        Encoder(tokenizer).encode({"messages": messages})


def test_without_a_template_fields_that_are_not_used_are_said(
    tokenizer: Any, settings: Settings
) -> None:
    tokenizer.chat_template = None
    row = chat(Q, A)
    row["messages"][0] |= {"name": "Ana", "lang": "en"}
    notes = tokenize("train", [row], tokenizer, settings()).report.notes
    line = "fields of messages that are not used without a chat template: lang, name"
    assert notes == [line]


@pytest.mark.parametrize("roles", [["system"], ["developer"], ["system", "developer"]])
def test_instructions_stay_where_the_oldest_turns_are_left_out(
    tokenizer: Any, settings: Settings, roles: list[str]
) -> None:
    instructions = [{"role": role, "content": f"Be {role}."} for role in roles]
    row = {"messages": instructions + chat("word " * 80, A, Q, A)["messages"]}
    tokens = tokenize("train", [row], tokenizer, settings(max_length=90))
    text = tokenizer.decode(tokens[0]["input_ids"])
    assert tokens.report.shortened == 1
    assert all(f"Be {role}." in text for role in roles)
    assert "word" not in text
