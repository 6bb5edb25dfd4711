"""What is learnt of chats, on the templates of published models that TRL ships."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from support.matrix import fixed_part

from finetune.data.chat_template import ChatTemplate
from finetune.data.encoding import IGNORED, Encoded, Encoder
from finetune.data.ignored import drop_ignored
from finetune.data.types import Messages, Prompt
from finetune.errors import ConfigError

TOKENS = re.compile(
    r"<[|\uff5c][^'\"<> ]+?[|\uff5c]>|<\|[a-z_]+>|<[a-z_]+\|>|</?s>|<(?:start|end)_of_(?:turn|utterance)>|</?think>|</?tool_call>"
)
"""Special tokens as they stand in the templates' texts."""

CALL = {
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"place": "Oslo"}},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def developer(text: str) -> dict[str, Any]:
    return {"role": "developer", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


RESULT = {"role": "tool", "name": "get_weather", "content": "10 degrees"}
KINDS: dict[str, tuple[Messages, list[Any] | None]] = {
    "system": ([system("Be brief."), user("Qone?"), answer("Aone.")], None),
    "turns": (
        [
            user("Qone?"),
            answer("Aone."),
            user("Qtwo?"),
            answer("Atwo."),
            user("Qsix?"),
            answer("Asix."),
        ],
        None,
    ),
    "tools": (
        [user("Qone?"), answer("", tool_calls=[CALL]), RESULT, answer("Aone.")],
        [TOOL],
    ),
    "reasoning": (
        [
            user("Qone?"),
            answer("Aone.", reasoning_content="Rone."),
            user("Qtwo?"),
            answer("Atwo.", reasoning_content="Rtwo."),
        ],
        None,
    ),
    "inline_reasoning": (
        [
            user("Qone?"),
            answer("<think>\nRone.\n</think>\n\nAone."),
            user("Qtwo?"),
            answer("Atwo."),
        ],
        None,
    ),
    "marked": (
        [user("Qone?"), answer("Aone.", train=False), user("Qtwo?"), answer("Atwo.")],
        None,
    ),
    "call_at_the_end": ([user("Qone?"), answer("", tool_calls=[CALL])], [TOOL]),
    "assistant_first": ([answer("Aone."), user("Qtwo?"), answer("Atwo.")], None),
    "empty_answer": (
        [user("Qone?"), answer(""), user("Qtwo?"), answer("Atwo.")],
        None,
    ),
    "developer": ([developer("Be brief."), user("Qone?"), answer("Aone.")], None),
    "repeated_result": (
        [
            user("Qone?"),
            answer("", tool_calls=[CALL]),
            {**RESULT, "content": "Atwo"},
            answer("Atwo."),
        ],
        [TOOL],
    ),
}
CONTEXT = ("Qone?", "Qtwo?", "Qsix?", "Be brief.", "10 degrees")


def templates() -> list[str]:
    import importlib.util

    specification = importlib.util.find_spec("trl")
    assert specification is not None
    assert specification.origin is not None
    folder = Path(specification.origin).parent / "chat_templates"
    return sorted(
        str(file) for file in folder.glob("*.jinja") if "_training" not in file.stem
    )


@pytest.fixture
def with_template(tokenizer: Any) -> Any:
    def set_template(file: str) -> Any:
        text = Path(file).read_text(encoding="utf-8")
        tokenizer.add_tokens(sorted(set(TOKENS.findall(text))), special_tokens=True)
        tokenizer.bos_token = "<|im_start|>"  # some templates begin with it
        tokenizer.chat_template = text
        return tokenizer

    return set_template


def learnt(example: Encoded, tokenizer: Any) -> list[str]:
    """The stretches of text that the loss counts."""
    stretches: list[list[int]] = [[]]
    for label in example.labels:
        if label == IGNORED:
            stretches.append([])
        else:
            stretches[-1].append(label)
    return [tokenizer.decode(ids) for ids in stretches if ids]


def rendered(tokenizer: Any, kind: str) -> list[str]:
    """The texts of the examples that a chat becomes."""
    messages, tools = KINDS[kind]
    row = {"messages": messages, **({"tools": tools} if tools else {})}
    examples = Encoder(tokenizer).encode(row).examples
    return [tokenizer.decode(example.ids) for example in examples]


def squeeze(text: str) -> str:
    return "".join(text.split())


def encode(tokenizer: Any, kind: str) -> tuple[list[str], int]:
    """What is learnt of a chat, and how many answers are counted as not learnt."""
    messages, tools = KINDS[kind]
    encoded = Encoder(tokenizer).encode(
        {"messages": messages, **({"tools": tools} if tools else {})}
    )
    stretches = [
        text for example in encoded.examples for text in learnt(example, tokenizer)
    ]
    return stretches, encoded.unlearnt.total()


@pytest.mark.parametrize(
    ("kind", "file"),
    fixed_part(itertools.product(KINDS, templates()), kind=lambda case: case[0]),
    ids=lambda value: Path(value).stem,
)
def test_each_answer_is_learnt_whole_with_its_end_or_counted_or_refused(
    with_template: Any, file: str, kind: str
) -> None:
    tokenizer = with_template(file)
    try:
        stretches, unlearnt = encode(tokenizer, kind)
        examples = rendered(tokenizer, kind)
    except ConfigError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert "\n" not in refusal
        assert "chat_template" in refusal or "dataset.ignore=[" in refusal
        return
    messages, _ = KINDS[kind]
    answers = [m for m in messages if m["role"] == "assistant" and m.get("train", True)]
    assert len(stretches) + unlearnt == len(answers)
    special = ChatTemplate(tokenizer).special_tokens
    for text in stretches:
        assert not any(context in text for context in CONTEXT), text
        ends = list(special.finditer(text))
        assert ends, text
        assert not text[ends[-1].end() :].strip(), text
    for message in answers[-len(stretches) :] if stretches else []:
        content = message["content"]
        assert any(squeeze(content) in squeeze(text) for text in examples)
        # A generation prompt may hold the beginning of the answer.
        texts = [content.removeprefix("<think>"), message.get("reasoning_content", "")]
        texts += ["get_weather", "Oslo"] if "tool_calls" in message else []
        squeezed = ["".join(text.split()) for text in stretches]
        assert any(all("".join(t.split()) in s for t in texts) for s in squeezed), (
            message
        )


BY_HAND = {
    "qwen2_5": {
        "turns": ["Aone.<|im_end|>\n", "Atwo.<|im_end|>\n", "Asix.<|im_end|>\n"],
        "system": ["Aone.<|im_end|>\n"],
        "marked": ["Atwo.<|im_end|>\n"],
        "tools": [
            '<tool_call>\n{"name": "get_weather", "arguments": {"place": "Oslo"}}\n</tool_call><|im_end|>\n',
            "Aone.<|im_end|>\n",
        ],
    },
    "qwen3": {
        "turns": [
            f"<think>\n\n</think>\n\n{text}.<|im_end|>\n"
            for text in ("Aone", "Atwo", "Asix")
        ],
        "reasoning": [
            "<think>\nRone.\n</think>\n\nAone.<|im_end|>\n",
            "<think>\nRtwo.\n</think>\n\nAtwo.<|im_end|>\n",
        ],
        "inline_reasoning": [
            "<think>\nRone.\n</think>\n\nAone.<|im_end|>\n",
            "<think>\n\n</think>\n\nAtwo.<|im_end|>\n",
        ],
        "call_at_the_end": [
            "<think>\n\n</think>\n\n<tool_call>\n"
            '{"name": "get_weather", "arguments": {"place": "Oslo"}}\n</tool_call><|im_end|>\n'
        ],
    },
    "gemma": {
        "turns": [
            "Aone.<end_of_turn>\n",
            "Atwo.<end_of_turn>\n",
            "Asix.<end_of_turn>\n",
        ],
        "system": ["Aone.<end_of_turn>\n"],
        "marked": ["Atwo.<end_of_turn>\n"],
    },
    "llama3_1": {
        "turns": ["Aone.<|eot_id|>", "Atwo.<|eot_id|>", "Asix.<|eot_id|>"],
        "tools": [
            '{"name": "get_weather", "parameters": {"place": "Oslo"}}<|eot_id|>',
            "Aone.<|eot_id|>",
        ],
        "assistant_first": ["Atwo.<|eot_id|>"],
    },
    "glm4moe": {
        "turns": [
            f"\n<think></think>\n{text}.<|user|>" for text in ("Aone", "Atwo", "Asix")
        ],
        "reasoning": [
            "\n<think>Rone.</think>\nAone.<|user|>",
            "\n<think>Rtwo.</think>\nAtwo.<|user|>",
        ],
    },
    "qwen3_5_think": {
        "inline_reasoning": [
            "Rone.\n</think>\n\nAone.<|im_end|>\n",
            "\n</think>\n\nAtwo.<|im_end|>\n",
        ],
        "empty_answer": ["\n</think>\n\nAtwo.<|im_end|>\n"],
    },
    "nemotron_3_nano": {
        "inline_reasoning": [
            "Rone.\n</think>\n\nAone.<|im_end|>\n",
            "Atwo.<|im_end|>\n",
        ],
    },
    "gptoss": {
        "empty_answer": ["<|channel|>final<|message|>Atwo.<|return|>"],
        "turns": [
            f"<|channel|>final<|message|>{text}.<|return|>"
            for text in ("Aone", "Atwo", "Asix")
        ],
    },
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name, kinds in BY_HAND.items() for kind in kinds],
)
def test_what_is_learnt_was_worked_out_by_hand(
    with_template: Any, name: str, kind: str
) -> None:
    [file] = [file for file in templates() if Path(file).stem == name]
    assert encode(with_template(file), kind)[0] == BY_HAND[name][kind]


@pytest.mark.parametrize(
    ("name", "kind", "fields"),
    [
        ("qwen2_5", "reasoning", "[reasoning]"),
        ("llama3", "tools", "[tools,tool_calls]"),
        ("llama3", "call_at_the_end", "[tools,tool_calls]"),
        ("phi3", "reasoning", "[reasoning]"),
        ("phi3", "repeated_result", "[tools,tool_calls]"),
        ("phi3", "developer", "[system]"),
        ("qwen3", "developer", "[system]"),
        ("deepseekv3", "tools", "[tools]"),
        ("deepseekv3", "call_at_the_end", "[tools]"),
    ],
)
def test_fields_that_a_template_leaves_out_are_refused_by_name(
    with_template: Any, name: str, kind: str, fields: str
) -> None:
    [file] = [file for file in templates() if Path(file).stem == name]
    with pytest.raises(ConfigError) as raised:
        encode(with_template(file), kind)
    assert f"dataset.ignore={fields}" in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "file"),
    fixed_part(
        itertools.product(
            ["tools", "repeated_result", "reasoning", "developer", "call_at_the_end"],
            templates(),
        ),
        kind=lambda case: case[0],
    ),
    ids=lambda value: Path(value).stem,
)
def test_a_row_trains_with_what_its_refusal_advises(
    with_template: Any, file: str, kind: str
) -> None:
    tokenizer = with_template(file)
    try:
        encode(tokenizer, kind)
    except ConfigError as error:
        advised = re.search(r"dataset\.ignore=\[(.*?)\]", str(error))
    else:
        return
    if advised is None:  # the template itself raised an error
        return
    messages, tools = KINDS[kind]
    content = {"messages": messages, **({"tools": tools} if tools else {})}
    row = drop_ignored(content, advised[1].split(","))
    if any(message["role"] == "assistant" for message in row["messages"]):
        assert Encoder(tokenizer).encode(row).examples


@pytest.mark.parametrize(
    "file",
    fixed_part(templates(), kind=lambda file: ""),
    ids=lambda file: Path(file).stem,
)
def test_what_is_remembered_of_a_template_finds_what_the_exact_search_finds(
    with_template: Any, file: str
) -> None:
    """Contents are words of the template itself, which stand in its frames as well."""
    tokenizer = with_template(file)
    words = [
        "user",
        "assistant",
        "a",
        "model",
        "<",
        " is it? ",
        "im_start",
        "the end",
        "0",
        "\nx\n",
    ]
    encoder = Encoder(tokenizer)
    for first in range(len(words)):
        contents = words[first:] + words[:first]
        messages = [
            (user if turn % 2 == 0 else answer)(content)
            for turn, content in enumerate(contents[: 2 + 2 * (first % 3)])
        ]
        row = {"messages": messages}
        assert encoder.encode(row) == Encoder(tokenizer).encode(row)


def test_prompts_are_asked_as_the_rows_are(with_template: Any) -> None:
    asked = 0
    for file in templates():
        if "nemotron" in file:  # asks for reasoning, which these rows do not have
            continue
        encoder = Encoder(with_template(file))
        [example] = encoder.encode({"messages": KINDS["system"][0]}).examples
        prompt = encoder.encode_prompt(Prompt("Qone?", "Be brief."))
        start = next(n for n, label in enumerate(example.labels) if label != IGNORED)
        common = min(start, len(prompt))
        assert prompt[:common] == example.ids[:common], file
        asked += 1
    assert asked > 30


def test_the_date_is_the_same_on_every_day(with_template: Any) -> None:
    [file] = [file for file in templates() if Path(file).stem == "llama3_2"]
    template = ChatTemplate(with_template(file))
    assert template.writes_date
    assert "Today Date: 26 Jul 2024" in template.render([user("Qone?")])
