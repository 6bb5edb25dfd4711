"""Files of every type, compression, encoding and place hold the same rows."""

import csv
import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from support.models import Row
from support.rows import Settings, texts, write_csv, write_json_list, write_parquet
from support.runs import write_jsonl

from finetune.data.rows import load_all_rows, load_rows
from finetune.data.sources import open_source
from finetune.data.types import BadRow
from finetune.errors import ConfigError

pytestmark = pytest.mark.usefixtures("fresh_cache")

ROWS: list[Row] = [
    {"instruction": "Add 1 and 1.", "output": "2"},
    {
        "instruction": "Say hello; “politely”, | please.",
        "output": "Good day,\nhow are you?",
    },
    {"instruction": "Was heißt “cat”?", "output": "Kätzchen;\tKatze"},
]


def raw_rows(path: Path | str, settings: Settings, **changes: object) -> list[Row]:
    return list(open_source("dataset.path", str(path), settings(**changes)).rows)


def write_delimited(delimiter: str) -> Callable[[Path, list[Row]], Path]:
    def write(file: Path, rows: list[Row]) -> Path:
        with open(file, "w", encoding="utf-8", newline="") as lines:
            writer = csv.DictWriter(lines, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
        return file

    return write


def write_feather(file: Path, rows: list[Row]) -> Path:
    pyarrow.feather.write_feather(pyarrow.Table.from_pylist(rows), str(file))
    return file


def write_ipc_stream(file: Path, rows: list[Row]) -> Path:
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return file


def write_data_key(file: Path, rows: list[Row]) -> Path:
    file.write_text(
        json.dumps({"version": "1.0", "data": rows, "tags": ["a"]}, indent=1)
    )
    return file


def write_data_key_on_one_line(file: Path, rows: list[Row]) -> Path:
    file.write_text(json.dumps({"rows": rows}))
    return file


def write_saved_dataset(folder: Path, rows: list[Row]) -> Path:
    from datasets import Dataset

    Dataset.from_list(rows).save_to_disk(str(folder), num_shards=2)
    return folder


def compress(content: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(content)
    return bytes(pyarrow.Codec("zstd").compress(content, asbytes=True))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.JSONL", write_jsonl),
        ("rows.Json", write_json_list),
        ("rows.json", write_data_key),
        ("rows.json", write_data_key_on_one_line),
        ("rows.CSV", write_csv),
        ("rows.csv", write_delimited(";")),
        ("rows.csv", write_delimited("\t")),
        ("rows.csv", write_delimited("|")),
        ("rows.tsv", write_delimited("\t")),
        ("rows.PARQUET", write_parquet),
        ("rows.feather", write_feather),
        ("rows.arrow", write_feather),
        ("rows.arrow", write_ipc_stream),
        ("saved", write_saved_dataset),
    ],
)
def test_a_file_of_any_type_holds_the_rows_that_were_written(
    settings: Settings,
    tmp_path: Path,
    name: str,
    write: Callable[[Path, list[Row]], Path],
) -> None:
    assert raw_rows(write(tmp_path / name, ROWS), settings) == ROWS


@pytest.mark.parametrize("compression", [".gz", ".zst", ".GZ"])
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.jsonl", write_jsonl),
        ("rows.json", write_json_list),
        ("rows.csv", write_csv),
        ("rows.csv", write_delimited(";")),
        ("rows.tsv", write_delimited("\t")),
    ],
)
def test_a_compressed_text_file_holds_its_rows(
    settings: Settings,
    tmp_path: Path,
    name: str,
    write: Callable[[Path, list[Row]], Path],
    compression: str,
) -> None:
    content = write(tmp_path / name, ROWS).read_bytes()
    file = tmp_path / f"{name}{compression}"
    file.write_bytes(compress(content, compression.lower()))
    assert raw_rows(file, settings) == ROWS


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_file_of_several_compressed_members_is_read_to_its_end(
    settings: Settings, tmp_path: Path, compression: str
) -> None:
    file = tmp_path / f"rows.txt{compression}"
    file.write_bytes(compress(b"one\n", compression) + compress(b"two\n", compression))
    assert raw_rows(file, settings) == [{"text": "one"}, {"text": "two"}]


def test_a_text_file_has_a_row_for_each_line_that_is_not_blank(
    settings: Settings, tmp_path: Path
) -> None:
    file = tmp_path / "rows.txt"
    file.write_bytes(b'First line, "as it is"\r\n\n  \nsecond\x0b line\nlast')
    expected = ['First line, "as it is"', "second\x0b line", "last"]
    assert [row["text"] for row in raw_rows(file, settings)] == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "text\nhello\nworld; of | rows\n",
            [{"text": "hello"}, {"text": "world; of | rows"}],
        ),
        ('text\n"a, b"\n\n"c\nd"\n', [{"text": "a, b"}, {"text": "c\nd"}]),
        ("text\n", []),
        ("a;b,c;d\n1;2,3;4\n", [{"a;b": "1;2", "c;d": "3;4"}]),
        (",text\n0,one\n1,two\n", [{"": "0", "text": "one"}, {"": "1", "text": "two"}]),
        ("a|b\n1|2\n", [{"a": "1", "b": "2"}]),
        ("a,b\n1,\n", [{"a": "1", "b": ""}]),
    ],
    ids=["one", "quoted", "header", "comma_first", "index", "bar", "empty_cell"],
)
def test_the_delimiter_is_one_that_divides_the_header_and_the_rows(
    settings: Settings, tmp_path: Path, content: str, expected: list[Row]
) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(content)
    assert raw_rows(file, settings) == expected


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt"])
@pytest.mark.parametrize(
    ("written", "encoding"),
    [
        ("utf-8", None),
        ("utf-8-sig", None),
        ("utf-16", None),
        ("utf-32", None),
        ("cp1252", "cp1252"),
        ("utf-16-le", "utf-16-le"),
        ("utf-16", "cp1252"),
        ("utf-8-sig", "cp1252"),
    ],
)
def test_text_is_read_by_its_mark_or_as_the_config_says(
    settings: Settings, tmp_path: Path, suffix: str, written: str, encoding: str | None
) -> None:
    word = "Kätzchen: “ja”"
    contents = {
        ".jsonl": f'{{"text": "{word}"}}\n',
        ".csv": f"text\n{word}\n",
        ".txt": f"{word}\n",
    }
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(contents[suffix].encode(written))
    assert raw_rows(file, settings, encoding=encoding) == [{"text": word}]


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": '{"a": 1}'}]


@pytest.mark.parametrize("column", ["messages", "conversations", "tools", "history"])
def test_a_cell_that_holds_json_is_read_in_columns_of_chats(
    settings: Settings, tmp_path: Path, column: str
) -> None:
    written = {"prompt": '{"a": 1}', "completion": "[1, 2]", "text": "[1]"}
    file = write_csv(tmp_path / "rows.csv", [{**written, column: json.dumps(CHAT)}])
    assert raw_rows(file, settings) == [{**written, column: CHAT}]


def test_columns_that_the_config_names_decide_which_cells_are_json(
    settings: Settings, tmp_path: Path
) -> None:
    row = {
        "log": json.dumps(CHAT),
        "history": "[1]",
        "tools": "[2] and no JSON",
        "dialog": "[3]",
    }
    file = write_csv(tmp_path / "rows.csv", [row])
    chats = raw_rows(file, settings, columns={"messages": "log"}, text_field="dialog")
    assert chats == [{**row, "log": CHAT, "history": [1]}]
    columns = {"prompt": "history", "completion": "tools"}
    assert raw_rows(file, settings, columns=columns, text_field="dialog") == [row]


def test_one_row_on_one_line_of_a_json_file_stays_a_row(
    settings: Settings, tmp_path: Path
) -> None:
    file = tmp_path / "rows.json"
    for row in (
        {"messages": CHAT},
        {"text": "a", "parts": [{"n": 1}]},
        {"a": 1, "b": [1]},
    ):
        file.write_text(json.dumps(row))
        assert raw_rows(file, settings) == [row]


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.csv.gz", "rows.parquet", "rows.feather"]
)
@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_a_url_is_opened_by_fsspec(
    settings: Settings, tmp_path: Path, protocol: str, name: str
) -> None:
    write = {
        "rows.jsonl": write_jsonl,
        "rows.csv.gz": write_csv,
        "rows.parquet": write_parquet,
        "rows.feather": write_feather,
    }[name]
    content = write(tmp_path / "written", texts(3)).read_bytes()
    url = f"{protocol}://{tmp_path}/{name}"
    with fsspec.open(url, "wb") as stored:
        stored.write(compress(content, ".gz") if name.endswith(".gz") else content)
    assert load_all_rows("dataset.path", settings(path=url)) == texts(3)


@pytest.mark.parametrize("as_url", [False, True])
def test_saved_data_sets_and_compressed_files_of_a_folder_are_what_their_names_say(
    settings: Settings, tmp_path: Path, as_url: bool
) -> None:
    from datasets import Dataset, DatasetDict

    saved, files = tmp_path / "saved", tmp_path / "files"
    words = ("train", "validation", "test")
    splits = {word: Dataset.from_list(texts(4, word)) for word in words}
    DatasetDict(splits).save_to_disk(str(saved))
    files.mkdir()
    for word, suffix in zip(words, (".gz", ".zst", ".gz"), strict=True):
        content = write_jsonl(tmp_path / "written", texts(4, word)).read_bytes()
        (files / f"{word}.jsonl{suffix}").write_bytes(compress(content, suffix))
    for folder in (saved, files):
        path = f"file://{folder}" if as_url else str(folder)
        rows = load_rows(settings(path=path))
        assert sorted(row["text"] for row in rows.train) == [
            row["text"] for row in texts(4, "train")
        ]
        assert rows.evaluation == texts(4, "validation")
        assert rows.test == texts(4, "test")
        assert settings(path=path).holds_out


def test_notes_and_compressed_copies_beside_data_files_are_no_rows(
    settings: Settings, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    content = write_jsonl(folder / "a.jsonl", texts(2)).read_bytes()
    (folder / "a.jsonl.gz").write_bytes(compress(content, ".gz"))
    (folder / "LICENSE.txt").write_text("As is.\n")
    (folder / "b.jsonl").mkdir()
    write_saved_dataset(folder / "saved", texts(3, "saved"))
    assert load_all_rows("dataset.path", settings(path=str(folder))) == texts(2)
    (folder / "a.jsonl").unlink()
    (folder / "a.jsonl.gz").unlink()
    assert load_all_rows("dataset.path", settings(path=str(folder))) == texts(
        3, "saved"
    )


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.json", "rows.csv", "rows.txt", "rows.parquet"]
)
def test_rows_are_read_one_by_one(
    settings: Settings, tmp_path: Path, name: str
) -> None:
    rows = texts(60_000, "a row that is long enough to be seen in memory " * 4)
    write = {".csv": write_csv, ".parquet": write_parquet}.get(
        Path(name).suffix, write_jsonl
    )
    file = write(tmp_path / name, rows)
    size = sum(len(row["text"]) for row in rows)
    del rows
    tracemalloc.start()
    count = sum(1 for _ in open_source("dataset.path", str(file), settings()).rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 60_000
    assert peak < size / 4


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", '{"text": "a"}\n{"text": \n{"text": "c"}\n'),
        ("rows.jsonl", '{"text": "a"}\n{"text": "b", "text": "B"}\n{"text": "c"}\n'),
        ("rows.json", '[{"text": "a"},\n"b",\n{"text": "c"}]'),
        ("rows.csv", "text\na\nb, b\nc\n"),
    ],
)
def test_a_row_that_cant_be_read_stands_among_the_rows_where_it_is_to_be_skipped(
    settings: Settings, tmp_path: Path, name: str, content: str
) -> None:
    file = tmp_path / name
    file.write_text(content)
    first, bad, last = raw_rows(file, settings, on_bad_row="skip")
    assert (first, last) == ({"text": "a"}, {"text": "c"})
    assert isinstance(bad, BadRow)
    with pytest.raises(ConfigError) as refused:
        raw_rows(file, settings)
    assert str(refused.value) == f"dataset.path={file}: {bad.reason}"


@pytest.mark.parametrize(
    "name", ["rows.parquet", "rows.arrow", "rows.feather", "saved"]
)
@pytest.mark.parametrize("as_url", [False, True])
def test_a_class_is_written_by_its_name_whatever_the_file(
    settings: Settings, tmp_path: Path, name: str, as_url: bool
) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features(
        {"text": Value("string"), "label": ClassLabel(names=["bad", "good"])}
    )
    rows = Dataset.from_dict({"text": ["Qone", "Qtwo"], "label": [1, 0]}, features)
    file = tmp_path / name
    if name == "saved":
        rows.save_to_disk(str(file))
    elif name == "rows.parquet":
        rows.to_parquet(str(file))
    else:
        table = rows.with_format("arrow")[:]
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
        )
        with pyarrow.ipc.new_file(str(file), table.schema) as writer:
            writer.write_table(table)
    path = f"file://{file}" if as_url else str(file)
    train = load_rows(settings(path=path)).train
    answers = {
        row["messages"][0]["content"]: row["messages"][1]["content"] for row in train
    }
    assert answers == {"Qone": "good", "Qtwo": "bad"}
