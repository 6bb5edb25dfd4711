"""Token ids and labels of chats and texts, compared with TRL's own."""

import logging
from pathlib import Path
from typing import Any

import pytest
from support.models import Row
from support.rows import CHATS, MANY_TURNS, A, Q, Settings, chat, texts, tokenize

from finetune.data.encoding import IGNORED
from finetune.errors import ConfigError

pytestmark = pytest.mark.usefixtures("fresh_cache")

HISTORY_WITHOUT_REASONING = (
    "{%- set seen = namespace(last_question=0) -%}"
    "{%- for m in messages -%}{%- if m['role'] == 'user' -%}{%- set seen.last_question = loop.index0 -%}{%- endif -%}"
    "{%- endfor -%}{%- for m in messages -%}{%- set content = m['content'] -%}"
    "{%- if m['role'] == 'assistant' and loop.index0 < seen.last_question -%}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') -%}"
    "{%- elif m['role'] == 'assistant' and '</think>' not in content -%}"
    "{%- set content = '<think>\n\n</think>\n\n' + content -%}{%- endif -%}"
    "{{- '<|im_start|>' + m['role'] + '\n' + content + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
"""Drops the reasoning of earlier answers and gives the last one an empty reasoning, as Qwen3's
template does."""
SYSTEM_IN_LAST_QUESTION = (
    "{%- if messages[0]['role'] == 'system' -%}{%- set system = messages[0]['content'] -%}"
    "{%- set turns = messages[1:] -%}{%- else -%}{%- set turns = messages -%}{%- endif -%}{%- for m in turns -%}"
    "{%- if m['role'] == 'user' and loop.last and system is defined -%}"
    "{{- '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' -}}"
    "{%- elif m['role'] == 'user' -%}{{- '[INST] ' + m['content'] + '[/INST]' -}}"
    "{%- else -%}{{- ' ' + m['content'] + eos_token -}}{%- endif -%}{%- endfor -%}"
)
"""Puts the system's text into a question that stands last, as the template of
Mistral-7B-Instruct-v0.3 does."""


def trl_tokens(
    tokenizer: Any,
    tiny_base: Path,
    rows: list[Row],
    max_length: int | None,
    folder: Path,
) -> list[Row]:
    """`input_ids` and `labels` as TRL's own SFTTrainer prepares them."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_base),
        args=SFTConfig(
            str(folder),
            use_cpu=True,
            bf16=False,
            report_to="none",
            max_length=max_length,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return list(trainer.train_dataset.select_columns(["input_ids", "labels"]))


def by_columns(row: Row) -> Row:
    """A chat as TRL's prompt and completion columns: the last answer is the completion."""
    return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}


@pytest.mark.parametrize("max_length", [None, 64])
def test_chats_become_the_tokens_and_labels_that_trl_makes_of_prompt_and_completion(
    tokenizer: Any,
    tiny_base: Path,
    settings: Settings,
    tmp_path: Path,
    max_length: int | None,
) -> None:
    with_system = {
        "messages": [
            {"role": "system", "content": "Be short."},
            *chat(Q, A)["messages"],
        ]
    }
    rows = [*CHATS, with_system]
    theirs = trl_tokens(
        tokenizer, tiny_base, [by_columns(row) for row in rows], max_length, tmp_path
    )
    ours = list(tokenize("train", rows, tokenizer, settings(max_length=max_length)))
    assert len(ours) == len(rows) - (
        max_length is not None
    )  # the long question leaves no room for its answer
    for mine, trls in zip(ours, theirs, strict=True):
        assert mine["input_ids"] == trls["input_ids"]
        assert mine["labels"] == trls["labels"]


def test_many_turns_become_trls_tokens_and_their_last_answer_trls_labels(
    tokenizer: Any, tiny_base: Path, settings: Settings, tmp_path: Path
) -> None:
    [theirs] = trl_tokens(
        tokenizer, tiny_base, [by_columns(MANY_TURNS)], None, tmp_path
    )
    [ours] = list(tokenize("train", [MANY_TURNS], tokenizer, settings(max_length=None)))
    assert ours["input_ids"] == theirs["input_ids"]
    last = next(n for n, label in enumerate(theirs["labels"]) if label != IGNORED)
    assert ours["labels"][last:] == theirs["labels"][last:]


def test_where_history_is_rendered_otherwise_each_answer_is_trls_prompt_and_completion(
    tokenizer: Any, tiny_base: Path, settings: Settings, tmp_path: Path
) -> None:
    tokenizer.chat_template = HISTORY_WITHOUT_REASONING
    messages = MANY_TURNS["messages"]
    rows = [by_columns({"messages": messages[:turns]}) for turns in (2, 4, 6)]
    theirs = trl_tokens(tokenizer, tiny_base, rows, None, tmp_path)
    assert (
        list(tokenize("train", [MANY_TURNS], tokenizer, settings(max_length=None)))
        == theirs
    )


@pytest.mark.parametrize("max_length", [None, 8])
def test_text_becomes_the_tokens_and_labels_that_trl_makes_of_it(
    tokenizer: Any,
    tiny_base: Path,
    settings: Settings,
    tmp_path: Path,
    max_length: int | None,
) -> None:
    rows = [*texts(3), {"text": "ends by itself<|im_end|>"}, {"text": "ünïcode, " * 9}]
    theirs = trl_tokens(tokenizer, tiny_base, rows, max_length, tmp_path)
    ours = list(tokenize("train", rows, tokenizer, settings(max_length=max_length)))
    assert ours == theirs
    assert all(row["labels"] == row["input_ids"] for row in ours)


def test_without_a_template_an_answer_follows_its_question_as_trl_has_it(
    tokenizer: Any, tiny_base: Path, settings: Settings, tmp_path: Path
) -> None:
    tokenizer.chat_template = None
    columns = [
        {"prompt": "2 + 2 =", "completion": " 4"},
        {"prompt": "Name a colour:\n", "completion": "blue"},
    ]
    theirs = trl_tokens(tokenizer, tiny_base, columns, None, tmp_path)
    rows = [chat(row["prompt"], row["completion"]) for row in columns]
    assert list(tokenize("train", rows, tokenizer, settings())) == theirs
    with pytest.raises(ConfigError, match=r"model\.chat_template"):
        tokenize("train", [MANY_TURNS], tokenizer, settings())


def labelled(row: Row, tokenizer: Any) -> list[str]:
    """The stretches of text that the loss counts."""
    stretches: list[list[int]] = [[]]
    for label in row["labels"]:
        if label == IGNORED:
            stretches.append([])
        else:
            stretches[-1].append(label)
    return [tokenizer.decode(ids) for ids in stretches if ids]


def test_every_assistant_turn_is_labelled_with_its_end_and_nothing_else(
    tokenizer: Any, settings: Settings
) -> None:
    system = {
        "messages": [
            {"role": "system", "content": "Be short."},
            *MANY_TURNS["messages"],
        ]
    }
    for row in list(tokenize("train", [MANY_TURNS, system], tokenizer, settings())):
        ends = ["Two.<|im_end|>\n", "Four!<|im_end|>\n", "You are welcome.<|im_end|>\n"]
        assert labelled(row, tokenizer) == ends
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        assert all(label in (token, IGNORED) for token, label in pairs)


def test_where_history_is_rendered_otherwise_every_answer_is_learnt_in_a_row_of_its_own(
    tokenizer: Any, settings: Settings
) -> None:
    tokenizer.chat_template = HISTORY_WITHOUT_REASONING
    thinking = chat(
        "1 + 1?",
        "<think>\nOne, one.\n</think>\n\nTwo.",
        "2 + 2?",
        "<think>\nTwo, two.\n</think>\n\nFour.",
    )
    plain = chat("1 + 1?", "Two.", "2 + 2?", "Four.")
    # What is left of the first answer begins as its reasoning does: a common prefix must not be
    # taken for an answer.
    alike = chat(
        "1 + 1?",
        "<think>\nA.\n</think>\n\n<think less",
        "2 + 2?",
        "<think>\nB.\n</think>\n\nFour.",
    )
    tokens = tokenize("train", [thinking, plain, alike], tokenizer, settings())
    rows = list(tokens)

    assert [labelled(row, tokenizer) for row in rows] == [
        ["<think>\nOne, one.\n</think>\n\nTwo.<|im_end|>\n"],
        ["<think>\nTwo, two.\n</think>\n\nFour.<|im_end|>\n"],
        ["<think>\n\n</think>\n\nTwo.<|im_end|>\n"],
        ["<think>\n\n</think>\n\nFour.<|im_end|>\n"],
        ["<think>\nA.\n</think>\n\n<think less<|im_end|>\n"],
        ["<think>\nB.\n</think>\n\nFour.<|im_end|>\n"],
    ]
    assert "One, one" not in tokenizer.decode(rows[1]["input_ids"])
    assert (tokens.report.rows, tokens.report.examples) == (3, 6)


def test_a_question_is_never_labelled_where_the_template_moves_the_system_text(
    tokenizer: Any, settings: Settings
) -> None:
    tokenizer.chat_template = SYSTEM_IN_LAST_QUESTION
    row = {
        "messages": [
            {"role": "system", "content": "Be short."},
            *chat("2 + 2?", "Four.")["messages"],
        ]
    }
    [tokens] = list(tokenize("train", [row], tokenizer, settings()))
    assert [text.strip() for text in labelled(tokens, tokenizer)] == ["Four.<|im_end|>"]
    assert "[INST] Be short.\n\n2 + 2?[/INST]" in tokenizer.decode(tokens["input_ids"])


def test_the_rows_own_end_token_is_learnt_although_it_is_the_padding(
    tokenizer: Any, settings: Settings
) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    for row in list(tokenize("train", [*CHATS, *texts(2)], tokenizer, settings())):
        assert tokenizer.eos_token_id in row["labels"][-2:]


def test_max_length_cuts_rows_and_leaves_out_those_without_an_answer_left(
    tokenizer: Any, settings: Settings
) -> None:
    whole = list(tokenize("train", CHATS, tokenizer, settings(max_length=None)))
    cut = list(tokenize("train", CHATS, tokenizer, settings(max_length=40)))
    assert max(len(row["input_ids"]) for row in whole) > 100
    assert max(len(row["input_ids"]) for row in cut) == 40
    assert cut == [
        {key: ids[:40] for key, ids in row.items()}
        for row in whole
        if any(n != IGNORED for n in row["labels"][:40])
    ]
    with pytest.raises(ConfigError, match=r"dataset\.max_length=4"):
        tokenize("train", CHATS, tokenizer, settings(max_length=4))


@pytest.mark.parametrize("packing", [False, True])
def test_rows_left_out_are_counted_and_said_from_the_cache_too(
    tokenizer: Any, settings: Settings, caplog: pytest.LogCaptureFixture, packing: bool
) -> None:
    assert (
        tokenize(
            "train", CHATS, tokenizer, settings(max_length=512, packing=packing)
        ).report.left_out.total()
        == 0
    )
    assert "left out" not in caplog.text
    caplog.set_level(logging.INFO)
    counts = []
    for _ in range(2):
        caplog.clear()
        counts.append(
            tokenize(
                "eval", CHATS, tokenizer, settings(max_length=64, packing=packing)
            ).report.left_out.total()
        )
        assert (
            "left out 1 eval rows with no answer within dataset.max_length"
            in caplog.text
        )
    assert counts == [1, 1]  # the long question


def test_no_rows_become_no_tokens(tokenizer: Any, settings: Settings) -> None:
    assert tokenize("test", [], tokenizer, settings()).report.left_out.total() == 0
    assert len(tokenize("test", [], tokenizer, settings())) == 0
    assert len(tokenize("test", [], tokenizer, settings(packing=True))) == 0
