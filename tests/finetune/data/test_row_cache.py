"""Rows are read once, and again as soon as a file or a key changes."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.rows import Settings, chat, marks, texts
from support.runs import write_jsonl

from finetune.data.all_rows import read_all_rows
from finetune.data.reading import open_path
from finetune.data.row_file import StoredRows
from finetune.data.rows import Rows, load_all_rows, load_rows
from finetune.errors import ConfigError
from finetune.files.arrow_file import ArrowFile

pytestmark = pytest.mark.usefixtures("fresh_cache")


def folders(tmp_path: Path, kind: str) -> set[str]:
    return {path.name for path in (tmp_path / "cache" / kind).glob("[!.]*")}


def test_rows_are_read_once_and_the_log_is_the_same_from_the_cache(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [*texts(30), {"text": 3}, {"text": ""}])
    keys = {"on_bad_row": "skip", "limit": 9, "eval_fraction": 0.2}

    def load() -> tuple[Rows, list[str]]:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            rows = load_rows(settings(path=str(file), **keys))
        return rows, caplog.messages

    first, first_lines = load()
    read = folders(tmp_path, "rows") | folders(tmp_path, "splits")
    # A cached row is changed behind the cache's back, so that reading again would show.
    again, again_lines = load()
    assert folders(tmp_path, "rows") | folders(tmp_path, "splits") == read
    assert len(first_lines) == 5
    assert again_lines == first_lines
    assert again == first
    assert [row.place for row in again.train] == [row.place for row in first.train]


CHANGES: list[tuple[str, Callable[[Path], dict[str, Any]]]] = [
    ("content", lambda file: change_content(file)),
    ("encoding", lambda file: {"encoding": "latin-1"}),
    ("ignored", lambda file: {"ignore": ["history"]}),
    ("template", lambda file: {"template": "{{ prompt }}?"}),
    ("group", lambda file: {"group_by": "prompt"}),
    ("name", lambda file: {"path": str(file.rename(file.with_name("b.jsonl")))}),
    ("eval", lambda file: {"eval_path": str(file)}),
]


def change_content(file: Path) -> dict[str, Any]:
    """Other text of the same length, with the same time of change."""
    before = file.stat()
    text = file.read_text().replace("answer 3", "answer X")
    file.write_text(text)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    return {}


@pytest.mark.parametrize(("name", "change"), CHANGES, ids=[name for name, _ in CHANGES])
def test_rows_are_read_again_after_a_change(
    settings: Settings, tmp_path: Path, name: str, change: Callable[[Path], Any]
) -> None:
    rows = [
        {"prompt": f"q{n}", "completion": f"answer {n}", "history": None}
        for n in range(9)
    ]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    load_rows(settings(path=str(file)))
    read = folders(tmp_path, "rows")
    keys = {"path": str(file), **change(file)}
    try:
        again = load_rows(settings(**keys))
    except (
        Exception
    ):  # all rows of eval_path stand in training: a refusal is an answer too
        assert name in ("eval", "ignored")
        return
    assert len(folders(tmp_path, "rows") - read) == 1
    if name == "content":
        assert chat("q3", "answer X") in list(again.train)
    assert {row.source for row in again.train} == {keys["path"]}


def test_a_file_that_changes_while_it_is_read_is_refused(
    settings: Settings, tmp_path: Path
) -> None:
    """Else the cache would hold the new rows as those of the old file."""
    rows = texts(9)
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    keys = settings(path=str(file))
    opened = {"train": [open_path("dataset.path", str(file), None, keys)]}
    write_jsonl(file, rows[:5])
    with pytest.raises(ConfigError, match="the file changed while it was read"):
        read_all_rows(opened, keys, with_ties=False)
    write_jsonl(file, rows)
    assert marks(load_rows(keys).train) == marks(rows)


SPLIT_CHANGES: list[dict[str, Any]] = [
    {"split_seed": 1},
    {"eval_fraction": 0.4},
    {"limit": 5},
    {"max_length": 7},
    {"loss_on": "all"},
]


@pytest.mark.parametrize("change", SPLIT_CHANGES, ids=str)
def test_another_split_does_not_read_the_rows_again(
    settings: Settings, tmp_path: Path, change: dict[str, Any]
) -> None:
    keys = {"path": str(write_jsonl(tmp_path / "a.jsonl", texts(40)))}
    first = load_rows(settings(eval_fraction=0.2, **keys))
    read = folders(tmp_path, "rows")
    second = load_rows(settings(**{"eval_fraction": 0.2, **keys, **change}))
    assert folders(tmp_path, "rows") == read
    is_split = change.keys().isdisjoint({"max_length", "loss_on"})
    assert (first.fingerprint != second.fingerprint) == is_split


def test_rows_of_a_url_without_a_hash_are_always_read_again(settings: Settings) -> None:
    import fsspec

    storage = fsspec.filesystem("memory")
    for word in ("one", "two", "one"):
        lines = "".join(f'{{"text": "{word} {n}"}}\n' for n in range(4))
        storage.pipe_file("/rows.jsonl", lines.encode())
        rows = load_rows(settings(path="memory://rows.jsonl"))
        assert marks(rows.train) == marks([{"text": f"{word} {n}"} for n in range(4)])


SPLITS_OF_URL: list[tuple[dict[str, Any], list[int]]] = [
    ({"path": "memory://a.jsonl"}, [9, 0, 0]),
    ({"path": "memory://a.jsonl", "eval_fraction": 0.4}, [5, 4, 0]),
    ({"path": "memory://a.jsonl", "eval_path": "memory://b.jsonl"}, [9, 9, 0]),
    ({"path": ["memory://a.jsonl", "memory://b.jsonl"]}, [18, 0, 0]),
    ({"path": "memory://a.jsonl", "test_path": "memory://b.jsonl"}, [9, 0, 9]),
    ({"path": "memory://b.jsonl", "test_path": "memory://a.jsonl"}, [9, 0, 9]),
    ({"path": "memory://a.jsonl", "eval_fraction": 0.4, "group_by": "g"}, [4, 5, 0]),
]


def test_urls_without_a_hash_are_divided_as_each_config_says(
    settings: Settings,
) -> None:
    """The cache holds the same rows of the configs before."""
    import fsspec

    storage = fsspec.filesystem("memory")
    for word in ("a", "b"):
        lines = [f'{{"text": "{word} {n}", "g": {n // 4}}}\n' for n in range(9)]
        storage.pipe_file(f"/{word}.jsonl", "".join(lines).encode())
    for keys, sizes in SPLITS_OF_URL:
        rows = load_rows(settings(**keys))
        assert [len(split) for split in rows.by_split.values()] == sizes, keys
    groups = [
        {int(row["text"][2:]) // 4 for row in split}
        for split in (rows.train, rows.evaluation)
    ]
    assert groups[0].isdisjoint(groups[1])


DAMAGES: list[tuple[str, int | None]] = [
    ("rows/*/rows.arrow", None),
    ("rows/*/rows.arrow", 0),
    ("rows/*/rows.arrow", 99),
    ("rows/*/sources.json", None),
    ("rows/*/summary.json", None),
    ("rows/*/summary.json", 9),
    ("rows/*/ties.npz", None),
    ("rows/*/ties.npz", 40),
    ("splits/*/split.json", None),
    ("splits/*/train.npy", 7),
]
"""Files of the cache, and how many bytes are left of them."""


@pytest.mark.parametrize("with_split", [True, False], ids=["", "no-split"])
@pytest.mark.parametrize(("pattern", "size"), DAMAGES)
def test_a_damaged_cache_is_created_anew(
    settings: Settings,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    pattern: str,
    size: int | None,
    with_split: bool,
) -> None:
    keys = {"path": str(write_jsonl(tmp_path / "a.jsonl", texts(40)))}
    first = load_rows(settings(eval_fraction=0.2, **keys))
    parts = {split: list(rows) for split, rows in first.by_split.items()}
    [file] = (tmp_path / "cache").glob(pattern)
    if size is None:
        file.unlink()
    else:
        os.truncate(file, size)
    if not with_split and pattern.startswith("rows"):
        shutil.rmtree(tmp_path / "cache" / "splits")
    again = load_rows(settings(eval_fraction=0.2, **keys))
    assert {split: list(rows) for split, rows in again.by_split.items()} == parts
    [line] = [text for text in caplog.messages if "damaged" in text]
    assert str(file.parent) in line


FULL_DISK = """
import resource, sys
from finetune.config.sections.dataset import DatasetSettings
from finetune.console import run_command
from finetune.data.rows import load_rows
settings = DatasetSettings(path=sys.argv[1], name=None, split="train", format="auto", text_field="text",
    max_length=64, packing=False, limit=None, eval_fraction=0.1, eval_path=None, test_fraction=0,
    test_path=None, split_seed=0)
size = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
run_command(lambda: load_rows(settings))
"""


@pytest.mark.parametrize("size", [1000, 150_000])
def test_a_full_disk_is_named_and_leaves_no_draft(tmp_path: Path, size: int) -> None:
    """The rows are too large, or only the phrases by which they are compared."""
    rows = [{"text": " ".join(f"{n}x{word}" for word in range(40))} for n in range(400)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    command = [sys.executable, "-c", FULL_DISK, str(file), str(size)]
    result = subprocess.run(command, capture_output=True, text=True)
    folder = tmp_path / "cache" / "rows"
    assert (result.returncode, result.stderr) == (
        1,
        f"error: File too large: {folder}\n",
    )
    assert not list(folder.glob("[!.]*"))


def test_all_rows_of_a_path_are_in_the_order_of_the_file(
    settings: Settings, tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", texts(2345))
    rows = load_all_rows("--data", settings(path=str(file)))
    assert list(rows) == texts(2345)
    assert [row.number for row in rows[998:1003]] == [999, 1000, 1001, 1002, 1003]
    assert rows[-1].place == f"{file}: row 2345"
    assert rows[2:4] == texts(4)[2:]
    assert rows != texts(2344)
    assert isinstance(rows[::-1], StoredRows)
    assert rows[::-1].in_source_order() == rows


def test_pages_that_were_read_are_given_back(
    settings: Settings, tmp_path: Path
) -> None:
    file = write_jsonl(
        tmp_path / "a.jsonl", [{"text": f"{n} " + "x" * 4000} for n in range(5000)]
    )
    rows = load_all_rows("--data", settings(path=str(file)))
    arrow = ArrowFile(rows.folder / "rows.arrow")

    def resident() -> int:
        """Kilobytes of this mapping that are in memory."""
        sizes = []
        is_mapping = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if " " in line and "-" in line.split()[0]:
                is_mapping = str(rows.folder) in line
            elif is_mapping and line.startswith("Rss:"):
                sizes.append(int(line.split()[1]))
        return sum(sizes)

    column = arrow.table["content"].combine_chunks()
    assert resident() > 15_000
    del column
    arrow.count_read(1)
    assert resident() > 15_000
    arrow.count_read(2**30)
    assert resident() < 1_000
    assert arrow.table["content"][4999].as_py().startswith('{"text": "4999 x')


@pytest.mark.parametrize(
    ("count", "held_out"),
    [(100, (10, 15)), (8_000, (800, 1000)), (12_000, (1000, 1000))],
)
def test_auto_holds_out_a_share_but_at_most_1000_rows(
    settings: Settings,
    tmp_path: Path,
    count: int,
    held_out: tuple[int, int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", texts(count))
    with caplog.at_level(logging.INFO):
        rows = load_rows(
            settings(path=str(file), eval_fraction="auto", test_fraction="auto")
        )
    assert (len(rows.evaluation), len(rows.test)) == held_out
    assert len(rows.train) == count - sum(held_out)
    said = [line for line in caplog.messages if "at most 1,000 rows" in line]
    assert len(said) == sum(size == 1000 for size in held_out)
    assert said == [f"data: {line}" for line in rows.notes]
