"""What is learnt by `dataset.loss_on`, and what becomes of rows that are too long or bad."""

import logging
from pathlib import Path
from typing import Any

import pytest
from support.rows import CHATS, MANY_TURNS, Settings, chat, texts, tokenize

from finetune.data.encoding import IGNORED, Encoder
from finetune.data.types import Prompt, Row
from finetune.errors import ConfigError

pytestmark = pytest.mark.usefixtures("fresh_cache")

LONG = chat("Tell me.", "word " * 60)


def learnt(row: dict[str, Any], tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in row["labels"] if label != IGNORED]))


@pytest.mark.parametrize(
    ("loss_on", "text"),
    [
        ("assistant", "Two.<|im_end|>\nFour!<|im_end|>\nYou are welcome.<|im_end|>\n"),
        ("last_answer", "You are welcome.<|im_end|>\n"),
    ],
)
def test_the_loss_is_on_answers(
    tokenizer: Any, settings: Settings, loss_on: str, text: str
) -> None:
    [row] = list(tokenize("train", [MANY_TURNS], tokenizer, settings(loss_on=loss_on)))
    assert learnt(row, tokenizer) == text


def test_the_loss_is_on_all_tokens(tokenizer: Any, settings: Settings) -> None:
    rows = [MANY_TURNS, *texts(1)]
    for row in list(tokenize("train", rows, tokenizer, settings(loss_on="all"))):
        assert row["labels"] == row["input_ids"]


def test_answers_that_are_marked_are_context(
    tokenizer: Any, settings: Settings
) -> None:
    messages = [dict(message) for message in MANY_TURNS["messages"]]
    messages[1]["train"] = False
    [row] = list(tokenize("train", [{"messages": messages}], tokenizer, settings()))
    assert learnt(row, tokenizer) == "Four!<|im_end|>\nYou are welcome.<|im_end|>\n"
    assert "Two." in tokenizer.decode(row["input_ids"])


def test_rows_that_are_cut_are_counted(
    tokenizer: Any, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(2):  # from the cache too
        caplog.clear()
        tokens = tokenize(
            "train", [LONG, *CHATS[:1]], tokenizer, settings(max_length=40)
        )
        assert tokens.report.cut == 1
        line = "data: cut 1 of 2 train rows to dataset.max_length=40: their end is lost"
        assert line in caplog.messages
    assert len(tokens[0]["input_ids"]) == 40


def test_rows_that_are_too_long_are_dropped_or_refused(
    tokenizer: Any, settings: Settings
) -> None:
    rows = [Row(LONG, "f.jsonl", 7), Row(CHATS[0], "f.jsonl", 8)]
    tokens = tokenize(
        "train", rows, tokenizer, settings(max_length=40, on_too_long="drop")
    )
    assert len(tokens) == 1
    assert dict(tokens.report.left_out) == {"rows longer than dataset.max_length": 1}
    with pytest.raises(
        ConfigError, match=r"f\.jsonl: row 7: has \d+ tokens; dataset\.max_length=40"
    ):
        tokenize(
            "train", rows, tokenizer, settings(max_length=40, on_too_long="refuse")
        )


def test_a_chat_loses_its_oldest_turns_before_its_answer(
    tokenizer: Any, settings: Settings
) -> None:
    system = {"role": "system", "content": "Be short."}
    old, last = chat("question " * 20, "Old."), chat("And now?", "New.")
    messages = [system, *old["messages"], *last["messages"]]
    tokens = tokenize(
        "train", [{"messages": messages}], tokenizer, settings(max_length=40)
    )
    [row] = tokens
    text = tokenizer.decode(row["input_ids"])
    assert "Be short." in text
    assert "question" not in text
    assert learnt(row, tokenizer) == "New.<|im_end|>\n"
    assert tokens.report.shortened == 1


def test_a_folded_system_turn_stays_when_the_oldest_turns_go(
    tokenizer: Any, settings: Settings
) -> None:
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + tokenizer.chat_template
    )
    system = {"role": "system", "content": "Be short."}
    old, last = chat("question " * 20, "Old."), chat("And now?", "New.")
    messages = [system, *old["messages"], *last["messages"]]
    tokens = tokenize(
        "train", [{"messages": messages}], tokenizer, settings(max_length=40)
    )
    text = tokenizer.decode(tokens[0]["input_ids"])
    assert "Be short.\n\nAnd now?" in text
    assert "question" not in text


def test_a_row_that_can_not_be_rendered_is_refused_by_its_place_or_skipped(
    tokenizer: Any, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if 'boom' in m['content'] %}{{ raise_exception('no boom') }}"
        "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    rows = [Row(CHATS[0], "f.jsonl", 1), Row(chat("boom", "A."), "f.jsonl", 2)]
    with pytest.raises(
        ConfigError, match=r"^f\.jsonl: row 2: model\.chat_template: .*no boom"
    ):
        tokenize("train", rows, tokenizer, settings())
    caplog.set_level(logging.INFO)
    tokens = tokenize("train", rows, tokenizer, settings(on_bad_row="skip"))
    assert len(tokens) == 1
    assert tokens.report.left_out.total() == 1
    assert any("skipped f.jsonl: row 2" in line for line in caplog.messages)


def test_text_that_is_rendered_already_gets_no_second_beginning_or_end(
    tokenizer: Any, settings: Settings
) -> None:
    from tokenizers.processors import TemplateProcessing

    start, end = "<|im_start|>", "<|im_end|>"
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (start, end)]
    for single in (f"{start} $A", f"{start} $A {end}", "$A"):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=single, special_tokens=ids
        )
        encoder = Encoder(tokenizer)
        for text in (
            "plain",
            f"{start}plain{end}",
            f"{start}plain{end}\n",
            f"plain{end}",
        ):
            [example] = encoder.encode({"text": text}).examples
            decoded = tokenizer.decode(example.ids).strip()
            begins = start in single or text.startswith(start)
            assert decoded == f"{start if begins else ''}plain{end}", (single, text)
        prompt = encoder.encode_prompt(Prompt("ask"))
        assert prompt[-1] != ids[1][1]  # never the tokenizer's own end


def test_fields_of_messages_that_no_template_uses_are_named_once(
    tokenizer: Any, settings: Settings
) -> None:
    messages = [
        {"role": "user", "content": "Q?", "lang": "en"},
        {"role": "assistant", "content": "A.", "timestamp": 3, "name": "Bo"},
    ]
    rows = [Row({"messages": messages}), *map(Row, CHATS)]
    line = (
        "fields of messages that the chat template does not use: lang, timestamp, name"
    )
    assert tokenize("train", rows, tokenizer, settings()).report.notes == [line]
    tokenizer.chat_template += "{# lang timestamp #}{{ messages[-1].name }}"
    assert tokenize("train", rows, tokenizer, settings()).report.notes == []


def test_variables_reach_the_template(tokenizer: Any, settings: Settings) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% for",
        "{{ 'T' if enable_thinking is defined and enable_thinking else 'F' }}{% for",
        1,
    )
    texts_by_value = {}
    for value in (None, {"enable_thinking": True}, {"enable_thinking": False}):
        [row] = list(tokenize("train", CHATS[:1], tokenizer, settings(), value))
        texts_by_value[str(value)] = tokenizer.decode(row["input_ids"])[0]
        asked = Encoder(tokenizer, value).encode_prompt(Prompt("x"))
        assert tokenizer.decode(asked)[0] == texts_by_value[str(value)]
    assert list(texts_by_value.values()) == ["F", "T", "F"]


def test_a_hundred_turns_are_rendered_once(tokenizer: Any, monkeypatch: Any) -> None:
    encoder = Encoder(tokenizer)
    long_chat = chat(*(f"turn {number} of the chat" for number in range(100)))
    encoder.encode(long_chat)  # the template's frames are found
    calls: list[int] = []
    assert encoder.template is not None
    render = encoder.template.render

    def counted(*arguments: Any, **more: Any) -> str:
        calls.append(1)
        return render(*arguments, **more)

    monkeypatch.setattr(encoder.template, "render", counted)
    [example] = encoder.encode(long_chat).examples
    assert len(calls) == 1
    assert sum(label == tokenizer.eos_token_id for label in example.labels) == 50


def test_a_tokenizer_without_a_backend_encodes_chats(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    [example] = Encoder(tokenizer).encode(chat("Hi?", "Yes ünï.")).examples
    answer = tokenizer.decode([label for label in example.labels if label != IGNORED])
    assert answer == "Yes ünï.</s>"
