"""Rows that earlier versions read rightly keep their content, and so the fingerprints of studies.

The fingerprints were computed by the version before messages went whole.
"""

from pathlib import Path

import pytest
from support.models import Row
from support.rows import Settings
from support.runs import write_jsonl

from finetune.data.rows import load_all_rows
from finetune.data.types import fingerprint

PINNED: list[tuple[str, Row, str]] = [
    ("text", {"text": "Just text."}, "6c7afbaaa887a651"),
    (
        "text_with_id",
        {"id": 7, "text": " Two\nlines. ", "url": None},
        "3872c244985113ac",
    ),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": "How many?"},
                {"role": "assistant", "content": "Four."},
            ]
        },
        "f7849a7418b4e30c",
    ),
    (
        "many_turns",
        {
            "messages": [
                {"role": "user", "content": "What is 1 + 1?"},
                {"role": "assistant", "content": "Two."},
                {"role": "user", "content": "And 2 + 2?"},
                {"role": "assistant", "content": "Four!"},
                {"role": "user", "content": "Thanks"},
                {"role": "assistant", "content": "You are welcome."},
            ]
        },
        "760566f57674089f",
    ),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "How many?"},
                {"from": "gpt", "value": "Four."},
            ]
        },
        "f7849a7418b4e30c",
    ),
    (
        "roles_in_conversations",
        {
            "conversations": [
                {"role": "user", "content": "How many?"},
                {"role": "assistant", "content": "Four."},
            ]
        },
        "f7849a7418b4e30c",
    ),
    (
        "system_and_unanswered",
        {
            "conversations": [
                {"from": "system", "value": "Be short."},
                {"from": "human", "value": "How many?"},
                {"from": "gpt", "value": "Four."},
                {"from": "human", "value": "And then?"},
            ]
        },
        "d15dfdb41d926117",
    ),
    (
        "empty_system",
        {
            "messages": [
                {"role": "system", "content": ""},
                {"role": "user", "content": "How many?"},
                {"role": "assistant", "content": "Four."},
            ]
        },
        "b51076b8bbbddd09",
    ),
    (
        "empty_answer_first",
        {
            "messages": [
                {"role": "user", "content": "How many?"},
                {"role": "assistant", "content": ""},
                {"role": "user", "content": "Really?"},
                {"role": "assistant", "content": "Four."},
            ]
        },
        "0574e746747891d0",
    ),
    (
        "message_ids",
        {
            "messages": [
                {"role": "user", "content": "How many?", "id": "a", "index": 0},
                {"role": "assistant", "content": "Four.", "id": "b", "index": 1},
            ]
        },
        "f7849a7418b4e30c",
    ),
    ("prompt", {"prompt": "How many?", "completion": "Four."}, "f7849a7418b4e30c"),
    (
        "prompt_white_space",
        {"prompt": " How many?\n", "completion": "\nFour. "},
        "394978649c772c5a",
    ),
    ("null_prompt", {"prompt": None, "completion": "Four."}, "4b09eda86d959071"),
    (
        "prompt_lists",
        {
            "prompt": [{"role": "user", "content": "How many?"}],
            "completion": [{"role": "assistant", "content": "Four."}],
        },
        "f7849a7418b4e30c",
    ),
    ("alpaca", {"instruction": "How many?", "output": "Four."}, "f7849a7418b4e30c"),
    (
        "alpaca_no_input",
        {"instruction": "How many?", "input": "", "output": "Four."},
        "f7849a7418b4e30c",
    ),
    (
        "alpaca_null_input",
        {"instruction": "How many?", "input": None, "output": "Four."},
        "f7849a7418b4e30c",
    ),
    (
        "alpaca_input",
        {"instruction": "How many?", "input": "Of five.", "output": "Four."},
        "a425cb8afdafed69",
    ),
    (
        "alpaca_beside_text",
        {"instruction": "How many?", "output": "Four.", "text": "both, rendered"},
        "f7849a7418b4e30c",
    ),
    (
        "alpaca_beside_prompt",
        {
            "instruction": "How many?",
            "input": "",
            "output": "Four.",
            "prompt": "### rendered",
        },
        "f7849a7418b4e30c",
    ),
    (
        "unicode",
        {
            "messages": [
                {"role": "user", "content": "Say hello."},
                {"role": "assistant", "content": " Hello,\n\nworld — “ünïcode” ✓ "},
            ]
        },
        "8e44d25934350175",
    ),
]


@pytest.mark.parametrize(
    ("row", "expected"), [case[1:] for case in PINNED], ids=[case[0] for case in PINNED]
)
def test_a_row_keeps_its_fingerprint(
    settings: Settings, tmp_path: Path, row: Row, expected: str
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [row])
    [content] = load_all_rows("dataset.path", settings(path=str(file)))
    assert fingerprint(content) == expected
