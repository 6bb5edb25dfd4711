"""`dataset.on_bad_row`: rows that can't be read end the run, or are counted and listed."""

import json
import logging
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from support.bad_input import matches
from support.rows import Settings, chat, store_rows, texts, write_parquet
from support.runs import write_jsonl

from finetune.data.rows import Rows, load_rows
from finetune.errors import ConfigError

pytestmark = pytest.mark.usefixtures("fresh_cache")

BAD_LINES = {
    "cut": '{"text": "cut',
    "no-object": '["text"]',
    "half-a-character": '{"text": "\\ud800"}',
    "no-field": '{"tekst": "a"}',
    "no-text": '{"text": 5}',
}
SAYS = {
    "cut": "line 4 is no whole JSON object",
    "no-object": "line 4 is no JSON object",
    "half-a-character": "line 4 has half a surrogate pair",
    "no-field": "has no field 'text'; its fields: tekst",
    "no-text": "field 'text' is no text but int",
}


@pytest.mark.parametrize("kind", BAD_LINES)
@pytest.mark.parametrize("is_first", [False, True])
def test_a_bad_row_is_refused_or_skipped_counted_and_listed(
    settings: Settings,
    tmp_path: Path,
    kind: str,
    is_first: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lines = [json.dumps(row) for row in texts(6)]
    lines.insert(0 if is_first else 3, BAD_LINES[kind])
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(ConfigError):
        load_rows(settings(path=str(file)))
    with caplog.at_level(logging.INFO, "finetune"):
        rows = load_rows(settings(path=str(file), on_bad_row="skip"))
    assert len(rows.train) == 6
    reason = f"bad rows of {file} (dataset.on_bad_row=skip)"
    assert rows.dropped == {reason: 1}
    [skipped] = rows.skipped
    assert (skipped.source, skipped.number) == (str(file), 1 if is_first else 4)
    if not is_first:
        assert skipped.reason.startswith(SAYS[kind])
        assert {row.number for row in rows.train} == {1, 2, 3, 5, 6, 7}
    lines = [line for line in caplog.messages if ": format " not in line]
    assert lines == [
        f"data: bad row {skipped.number} of {file}: {skipped.reason}",
        f"data: left out 1 {reason}",
    ]
    assert rows.counts["skipped"] == [
        {"source": str(file), "number": skipped.number, "reason": skipped.reason}
    ]


def test_the_first_bad_rows_are_listed_and_all_are_counted(
    settings: Settings, tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [*texts(3), *[{"text": 5}] * 50])
    held = write_jsonl(tmp_path / "b.jsonl", [{"text": 1}, *texts(3, "held")])
    rows = load_rows(settings(path=str(file), eval_path=str(held), on_bad_row="skip"))
    assert [row.number for row in rows.skipped] == list(range(4, 24))
    assert sorted(rows.dropped.values()) == [1, 50]
    assert len(rows.evaluation) == 3


def test_rows_without_a_column_of_the_group_are_bad(
    settings: Settings, tmp_path: Path
) -> None:
    good = [{"text": f"good row {n}", "id": n} for n in range(5)]
    file = str(write_jsonl(tmp_path / "a.jsonl", [*good, {"text": "no id"}]))
    says = r"dataset\.group_by=id: .*row 6 has no such column; its columns: text"
    with pytest.raises(ConfigError, match=says):
        load_rows(settings(path=file, group_by="id"))
    assert (
        len(load_rows(settings(path=file, group_by="id", on_bad_row="skip")).train) == 5
    )


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": 1}\n{"text": 2}\n', "none of 2 rows can be read; the first, row 1 of"),
        ("b.jsonl", b'{\n "text": "a"\n}\n', "none of 3 rows can be read; the first, row 1 of"),
        ("c.jsonl", b'{"a": "b"}\n' * 4, "none of 4 rows can be read; the first, row 1 of"),
        ("d.jsonl", b'{"text": " "}\n{"text": 2}\n', "no rows are left: none of 1 has any text"),
        ("e.jsonl", '{"text": "ä"}\n'.encode("latin-1"), "is not UTF-8 text"),
        ("f.json", b'[{"text": "a"}, {"text" "b"}]', "line 1 is broken JSON"),
        ("g.parquet", b"PAR1 but not really PAR1", "no readable Parquet file"),
        ("h.jsonl", b"", "the file is empty"),
    ],
)  # fmt: skip
def test_errors_of_a_whole_file_are_refused_though_bad_rows_are_skipped(
    settings: Settings, tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        load_rows(settings(path=str(tmp_path / name), on_bad_row="skip"))
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_counts_list_only_what_there_is() -> None:
    def rows(count: int, **report: Any) -> Rows:
        none = store_rows([])
        return Rows(store_rows(texts(count)), none, none, "", None, **report)

    counts = rows(0, dropped={"some": 1}).counts
    assert counts == {"train": 0, "eval": 0, "test": 0, "dropped": {"some": 1}}
    counts = rows(1, dropped={}, commits={"owner/name": "abc"}, notes=["a"]).counts
    assert counts["train"] == 1
    assert counts["commits"] == {"owner/name": "abc"}
    assert counts["notes"] == ["a"]


NO_JSON: list[tuple[str, dict[str, Any], str]] = [
    ("date", {"when": datetime(2024, 1, 1)}, "messages 2: field 'when' is no text, number, list or object but datetime; dataset.ignore=[when] leaves it out"),
    ("decimal", {"cost": Decimal("1.5")}, "messages 2: field 'cost' is no text, number, list or object but Decimal; …"),
    ("bytes", {"raw": b"\xff"}, "messages 2: field 'raw' is no text, number, list or object but bytes; …"),
    ("inside", {"meta": {"times": [None, datetime(2024, 1, 1)]}}, "messages 2 meta times: field '2' is no text, number, list or object but datetime"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "field", "says"), NO_JSON, ids=[case[0] for case in NO_JSON]
)
def test_values_that_json_does_not_have_are_refused_skipped_or_ignored(
    settings: Settings, tmp_path: Path, name: str, field: dict[str, Any], says: str
) -> None:
    rows: list[dict[str, Any]] = [chat(f"Q{n}?", f"A{n}.") for n in range(6)]
    rows[2]["messages"][1] |= field
    rows = [{**row, "group": n // 2} for n, row in enumerate(rows)]
    file = write_parquet(tmp_path / "rows.parquet", rows)
    with pytest.raises(ConfigError) as refused:
        load_rows(settings(path=str(file)))
    assert matches(f"dataset.path={file}: row 3, {says}", str(refused.value))
    keys = {"path": str(file), "group_by": "group", "eval_fraction": 0.4}
    skipped = load_rows(settings(on_bad_row="skip", **keys))
    assert [row.number for row in skipped.skipped] == [3]
    ignored = load_rows(settings(ignore=[*field], **keys))
    assert not ignored.skipped
    for result in (skipped, ignored):
        groups = [
            {(row.number - 1) // 2 for row in split}
            for split in result.by_split.values()
        ]
        assert groups[0].isdisjoint(groups[1])
        assert groups[0] | groups[1] == {0, 1, 2}


def test_a_bad_message_is_listed_without_the_place_of_its_row(
    settings: Settings, tmp_path: Path
) -> None:
    rows = [chat("Q?", f"A{number}.") for number in range(4)]
    rows[2]["messages"][0]["role"] = "alien"
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    [skipped] = load_rows(settings(path=str(file), on_bad_row="skip")).skipped
    assert skipped.reason.startswith("message 1: role=alien: allowed: ")
