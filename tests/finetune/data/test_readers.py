"""Reading rows from files and folders of every kind, and refusing bad files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.models import Row
from support.rows import (
    Settings,
    chat,
    texts,
    write_csv,
    write_json_list,
    write_parquet,
)
from support.runs import write_jsonl

from finetune.data.rows import load_all_rows, load_rows
from finetune.errors import ConfigError

pytestmark = pytest.mark.usefixtures("fresh_cache")

TWO_CHATS = [
    {"instruction": "Add 1 and 1.", "output": "2"},
    {"instruction": "Say hello, “politely”.", "output": "Good day,\nhow are you?"},
]


def write_json_lines_with_byte_order_mark(file: Path, rows: list[Row]) -> Path:
    file.write_text(
        "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        encoding="utf-8-sig",
    )
    return file


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.jsonl", write_jsonl),
        ("rows.jsonl", write_json_lines_with_byte_order_mark),
        ("rows.json", write_json_list),
        ("rows.json", write_jsonl),
        ("rows.csv", write_csv),
        ("rows.parquet", write_parquet),
    ],
)
def test_reads_the_same_rows_from_every_kind_of_file(
    settings: Settings,
    tmp_path: Path,
    name: str,
    write: Callable[[Path, list[Row]], Path],
) -> None:
    file = write(tmp_path / name, TWO_CHATS)
    expected = [chat(row["instruction"], row["output"]) for row in TWO_CHATS]
    assert load_all_rows("dataset.path", settings(path=str(file))) == expected


def test_reads_chats_from_parquet(settings: Settings, tmp_path: Path) -> None:
    rows = [chat("Hello?", "Yes."), chat("One?", "1", "Two?", "2")]
    file = write_parquet(tmp_path / "rows.parquet", rows)
    assert load_all_rows("dataset.path", settings(path=str(file))) == rows


def test_reads_all_files_of_a_folder_in_the_order_of_their_names(
    settings: Settings, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    rows = texts(8)
    write_parquet(folder / "d.parquet", rows[6:])
    write_csv(folder / "c.csv", rows[4:6])
    write_jsonl(folder / "a.jsonl", rows[:2])
    write_json_list(folder / "b.json", rows[2:4])
    (folder / "README.md").write_text("no rows in here")
    assert load_all_rows("dataset.path", settings(path=str(folder))) == rows


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "b.jsonl",
            '{"text": "fine"}\n{"text": 1}\n',
            "row 2: field 'text' is no text but int",
        ),
        (
            "b.jsonl",
            '{"text": "fine"}\n\n{"text": \n',
            "line 3 is no whole JSON object",
        ),
        (
            "b.json",
            '[{"text": "fine"}, {"tekst": "b"}]',
            "row 2 has no field 'text'; its fields: tekst",
        ),
        ("b.csv", "tekst\nfine\n", "row 1 has no field 'text'; its fields: tekst"),
        (
            "a.csv",
            "tekst\nfine\n",
            "row 1 has the columns of no format; its fields: tekst",
        ),
    ],
    ids=["jsonl", "broken_line", "json", "csv", "first_file"],
)
def test_a_bad_row_in_a_folder_is_named_by_its_file_and_its_place_in_it(
    settings: Settings, tmp_path: Path, name: str, content: str, says: str
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", texts(5))
    (folder / name).write_text(content)
    with pytest.raises(ConfigError) as refused:
        load_all_rows("dataset.path", settings(path=str(folder)))
    assert f"dataset.path={folder / name}" in str(refused.value)
    assert says in str(refused.value)


def test_reads_csv_cells_longer_than_the_csv_module_takes_by_default(
    settings: Settings, tmp_path: Path
) -> None:
    rows = [{"text": "word " * 40_000}]
    file = write_csv(tmp_path / "rows.csv", rows)
    assert load_all_rows("dataset.path", settings(path=str(file))) == rows


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "fine"}\n{"text": \n', ["line 2", "no whole JSON object"]),
        (
            '{"text": "fine"}\n[1]\n',
            ["line 2", "no JSON object", "one object on each line"],
        ),
        (json.dumps({"text": "fine"}, indent=1), ["line 1", "one object on each line"]),
        (
            json.dumps([{"text": "fine"}], indent=1),
            ["line 1", "one object on each line"],
        ),
        ('{"text": "half a pair \\ud83d"}\n', ["line 1", "surrogate"]),
        ('{"body": "fine"}\n', ["dataset.text_field", "body"]),
        ('{"text": 1}\n', ["row 1", "text", "int"]),
        ('{"messages": "none"}\n', ["row 1", "messages"]),
        ('{"messages": [{"role": "user"}]}\n', ["row 1", "content"]),
        ("", ["empty"]),
        ("\n", ["no rows"]),
        ('{"text": ""}\n', ["no rows are left"]),
    ],
)
def test_bad_files_are_refused_in_one_line_that_names_the_file_and_the_place(
    settings: Settings, tmp_path: Path, content: str, words: list[str]
) -> None:
    require_refusal(settings, tmp_path / "rows.jsonl", content, words)


def require_refusal(
    settings: Settings, file: Path, content: str, words: list[str]
) -> None:
    """One line that has the words and the file's path."""
    file.write_text(content)
    with pytest.raises(ConfigError) as refused:
        load_rows(settings(path=str(file)))
    message = str(refused.value)
    assert all(word in message for word in [*words, str(file)])
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            json.dumps({"text": "fine"}, indent=1),
            ["line 1", "a list of objects, or one object on each line"],
        ),
        (
            '[{"text": "fine"},\n "text"]',
            [
                "row 2 is no JSON object",
                "a list of objects, or one object on each line",
            ],
        ),
        ('[\n{"text": "a"},\n{"text" "b"}]', ["line 3 is broken JSON"]),
        (
            '[{"text": "fine"},\n{"text": "half a pair \\ud83d"}]',
            ["row 2", "surrogate"],
        ),
    ],
    ids=["one_object", "item", "broken", "surrogate"],
)
def test_a_bad_json_file_is_refused_with_what_is_expected_of_it(
    settings: Settings, tmp_path: Path, content: str, words: list[str]
) -> None:
    require_refusal(settings, tmp_path / "rows.json", content, words)
