"""Formats of rows: detected or named, turned into chats or texts."""

from pathlib import Path

import pytest
from support.models import Row
from support.rows import A, Q, Settings, asked, chat
from support.runs import write_jsonl

from finetune.data.prompts import first_prompt
from finetune.data.rows import load_all_rows, load_rows

pytestmark = pytest.mark.usefixtures("fresh_cache")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "Just text."}, [{"text": "Just text."}]),
        (
            {
                "messages": [
                    {"role": "user", "content": Q},
                    {"role": "assistant", "content": A},
                ]
            },
            asked(Q, A),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": Q},
                    {"from": "gpt", "value": A},
                ]
            },
            asked(Q, A),
        ),
        (
            {
                "conversations": [
                    {"role": "user", "content": Q},
                    {"role": "assistant", "content": A},
                ]
            },
            asked(Q, A),
        ),
        ({"prompt": Q, "completion": A}, asked(Q, A)),
        (
            {
                "prompt": [{"role": "user", "content": Q}],
                "completion": [{"role": "assistant", "content": A}],
            },
            asked(Q, A),
        ),
        ({"instruction": Q, "output": A}, asked(Q, A)),
        ({"instruction": Q, "input": "", "output": A}, asked(Q, A)),
        (
            {"instruction": Q, "input": "Of five.", "output": A},
            asked(f"{Q}\n\nOf five.", A),
        ),
        ({"instruction": Q, "output": A, "text": "both, rendered"}, asked(Q, A)),
    ],
    ids=[
        "text",
        "messages",
        "sharegpt",
        "roles",
        "prompt",
        "prompt_lists",
        "alpaca",
        "no_input",
        "input",
        "both",
    ],
)
def test_finds_out_the_format_by_itself(
    settings: Settings, tmp_path: Path, row: Row, expected: list[Row]
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [row])
    assert load_all_rows("dataset.path", settings(path=str(file))) == expected


def test_a_named_format_and_text_field_win_over_what_would_be_found_out(
    settings: Settings, tmp_path: Path
) -> None:
    file = write_jsonl(
        tmp_path / "rows.jsonl", [{"instruction": Q, "output": A, "body": "Just text."}]
    )
    rows = load_all_rows(
        "dataset.path", settings(path=str(file), format="text", text_field="body")
    )
    assert rows == [{"text": "Just text."}]


def test_keeps_the_system_turn_and_cuts_what_follows_the_last_answer(
    settings: Settings, tmp_path: Path
) -> None:
    turns = [("system", "Be short."), ("human", Q), ("gpt", A), ("human", "And then?")]
    file = write_jsonl(
        tmp_path / "rows.jsonl",
        [{"conversations": [{"from": f, "value": v} for f, v in turns]}],
    )
    [row] = load_all_rows("dataset.path", settings(path=str(file)))
    assert row["messages"] == [
        {"role": "system", "content": "Be short."},
        *chat(Q, A)["messages"],
    ]
    assert first_prompt(row).text == Q


@pytest.mark.parametrize(
    ("good", "empty"),
    [
        ({"text": "Something."}, [{"text": " \n"}, {"text": ""}, {"text": None}]),
        (
            {"prompt": Q, "completion": A},
            [{"prompt": Q, "completion": "  "}, {"prompt": Q, "completion": None}],
        ),
        ({"instruction": Q, "output": A}, [{"instruction": Q, "output": ""}]),
        (chat(Q, A), [chat(Q), {"messages": []}]),
        (chat(Q, A), [chat(Q, ""), chat(Q, " ", "Really?", "\n")]),
        (
            {
                "prompt": chat(Q)["messages"],
                "completion": [{"role": "assistant", "content": A}],
            },
            [{"prompt": chat(Q)["messages"], "completion": []}],
        ),
    ],
    ids=[
        "text",
        "prompt",
        "alpaca",
        "chat_without_answer",
        "chat_with_empty_answers",
        "prompt_lists",
    ],
)
def test_drops_and_counts_rows_with_nothing_to_learn(
    settings: Settings, tmp_path: Path, good: Row, empty: list[Row]
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [good, *empty])
    rows = load_rows(settings(path=str(file)))
    assert len(rows.train) == 1
    assert sum(rows.dropped.values()) == len(empty)
    assert rows.counts == {"train": 1, "eval": 0, "test": 0, "dropped": rows.dropped}
