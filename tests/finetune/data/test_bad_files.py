"""A file that can't be read is refused in one line with the key, the file, and what is allowed."""

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from support.bad_input import FILE_TYPES, matches
from support.configs import compose
from support.rows import Settings, texts, write_parquet

from finetune.data.rows import load_all_rows
from finetune.errors import ConfigError

pytestmark = pytest.mark.usefixtures("fresh_cache")

LINE = b'{"text": "fine"}\n'
GERMAN = '{"text": "schöne Grüße"}\n'
RUSSIAN = '{"text": "Привет, как дела? Хорошо, спасибо."}\n' * 5


def parquet(tail: slice = slice(None), **columns: list[object]) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns or {"text": ["a", "b"]}), stream)
    return stream.getvalue()[tail]


def arrow_with_two_columns_of_a_name() -> bytes:
    stream = io.BytesIO()
    table = pyarrow.Table.from_arrays(
        [pyarrow.array(["a"])] * 2, names=["text", "text"]
    )
    with pyarrow.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table)
    return stream.getvalue()


JSONL = "a .jsonl file holds one object on each line"

BAD_FILES: list[tuple[str, bytes, str]] = [
    ("d.xml", LINE, f"must be a {FILE_TYPES}"),
    ("d.parquet.gz", LINE, f"must be a {FILE_TYPES}"),
    ("d.gz", LINE, f"must be a {FILE_TYPES}"),
    ("d.jsonl.gz", b"", "the file is empty"),
    ("d.jsonl.gz", gzip.compress(b"", mtime=0), "the file is empty"),
    ("d.jsonl.gz", LINE, "no readable gzip file (Not a gzipped file…)"),
    ("d.jsonl.gz", gzip.compress(LINE * 99, mtime=0)[:-9], "no readable gzip file (…)"),
    ("d.jsonl.gz", gzip.compress(LINE, mtime=0)[:12] + b"\xff" * 40, "no readable gzip file (…)"),
    ("d.jsonl.zst", LINE, "can't be read (ZSTD decompress failed…)"),
    (
        "d.jsonl.zst",
        bytes(pyarrow.Codec("zstd").compress(LINE * 9, asbytes=True))[:-5],
        "can't be read (Truncated compressed stream)",
    ),
    ("d.jsonl", gzip.compress(LINE, mtime=0), "is a gzip file: its name must end in .gz"),
    ("d.csv", parquet(), "is a Parquet file: its name must end in .parquet"),
    ("d.csv", b"PK\x03\x04" + bytes(30), "is a zip archive or a spreadsheet: …"),
    ("d.jsonl", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "line 1 is not UTF-8 text; …binary file"),
    ("d.txt", LINE + bytes(range(128, 256)) + bytes(10), "line 2 is not UTF-8 text; …binary file"),
    ("d.parquet", b"", "the file is empty"),
    ("d.parquet", parquet(slice(None, -20)), "no readable Parquet file (…)"),
    ("d.parquet", parquet(slice(20, None)), "no readable Parquet file (…)"),
    ("d.arrow", b"ARROW1\0\0 and no more", "no readable Arrow file (…)"),
    ("d.feather", LINE, "no readable Arrow file (…)"),
    ("d.arrow", arrow_with_two_columns_of_a_name(), "has two columns 'text'"),
    (
        "d.jsonl",
        LINE * 3000 + GERMAN.encode("cp1252"),
        "line 3001 is not UTF-8 text; it looks like cp1252: dataset.encoding=cp1252 reads it",
    ),
    (
        "d.txt.gz",
        gzip.compress("naïve café\n".encode("latin-1"), mtime=0),
        "line 1 is not UTF-8 text; it looks like cp1252: dataset.encoding=cp1252 reads it",
    ),
    (
        "d.jsonl",
        RUSSIAN.encode("cp1251"),
        "line 1 is not UTF-8 text; it looks like cp1251: dataset.encoding=cp1251 reads it",
    ),
    (
        "d.jsonl",
        GERMAN.encode("utf-16-le"),
        "line 1 is not UTF-8 text; it looks like utf-16-le: dataset.encoding=utf-16-le reads it",
    ),
    (
        "d.csv",
        ("text\n" + GERMAN).encode("utf-16-le"),
        "line 2 is not UTF-8 text; it looks like utf-16-le: dataset.encoding=utf-16-le reads it",
    ),
    (
        "d.csv",
        ("text\n" + GERMAN).encode("utf-16-be"),
        "line 2 is not UTF-8 text; it looks like utf-16-be: dataset.encoding=utf-16-be reads it",
    ),
    ("d.csv", "text\nä\n".encode("utf-16")[:-1], "begins with the mark of utf-16 but is no such text (…)"),
    ("d.jsonl", LINE + b'{"text": "a", "text": "b"}', "line 2 has the key 'text' twice in one object"),
    ("d.jsonl", LINE + b'{"a": ' + b"[" * 150 + b"]" * 150 + b"}", "line 2 is nested more than 100 levels deep"),
    ("d.jsonl", b'{"a": ' + b"[" * 9999, "line 1 is nested more than 100 levels deep"),
    ("d.json", b'[{"a": ' + b"[" * 9999, "row 1 can't be parsed (…)"),
    ("d.jsonl", b'{"a": ' + b"1" * 5000 + b"}", "line 1 has a number of more than 4300 digits"),
    ("d.jsonl", b'{"text": NaN}\n', "row 1: field 'text' is no text but float"),
    ("d.jsonl", b'[{"text": "a"}]\n', f"line 1 is no JSON object; {JSONL}"),
    ("d.json", b'[{"text": "a"}, {"b": 1, "b": 2}]', "row 2 has the key 'b' twice in one object"),
    ("d.json", b'[{"text": "a"},\n]', "line 2 is broken JSON (Expecting value)"),
    ("d.json", b'[{"text": "a"}\n{"text": "b"}]', "line 2 is broken JSON (Expecting ',' delimiter)"),
    ("d.json", b'[{"text": "a"}]\n[]', "line 2 is broken JSON (Extra data)"),
    ("d.json", b'[{"text": "a"}', "line 1 is broken JSON (…)"),
    ("d.json", b"[]", "holds no rows"),
    ("d.json", b'"text"', "line 1 is no JSON object; a .json file holds a list of objects, …"),
    (
        "d.json",
        b'{"train": [{"text": "a"}], "test": [{"text": "b"}]}',
        "one object with several lists of rows: train, test; write each to a file",
    ),
    ("d.json", b'{"data": [{"text": "a"}, 2]}', "row 2 of 'data' is no JSON object; …"),
    ("d.json", b'{\n"data": [{"text": "a"},\n]}', "line 3 is broken JSON (…)"),
    ("d.json", b'{\n"text": {"0": "a"}}', "line 1 is no whole JSON object (it goes on below); …"),
    (
        "d.csv",
        b"instruction,output\nWho?,Well, Ana.\n",
        "line 2 has 3 cells, the header 2; a cell that holds a comma stands in quotes",
    ),
    (
        "d.csv",
        b"instruction;output\nWho?;A;B\nWho?;A\nWho?;B\n",
        "line 2 has 3 cells, the header 2; a cell that holds a semicolon stands in quotes",
    ),
    ("d.csv", b'text,b\n"1\n1",2\n\n3\n', "line 5 has 1 cells, the header 2; …"),
    ("d.tsv", b"a\tb\n1\t2\t3\n", "line 2 has 3 cells, the header 2; a cell that holds a tab stands in quotes"),
    ("d.csv", b"text,text\na,b\n", "line 1, the header, names 'text' twice"),
    ("d.csv", b'"", \na,b\n', "line 1, the header, names no column"),
    ("d.csv", b'text\na\n"never closed\nb\nc\n', "line 3 begins a record with a quote that is never closed"),
    (
        "d.csv",
        b'messages\n"[{""role"": ""user"", ""role"": ""user""}]"\n',
        "row 1: column 'messages' has the key 'role' twice in one object",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "says"), BAD_FILES)
def test_a_bad_file_is_refused_in_one_line(
    settings: Settings, tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    require_refusal(settings, str(file), says)


def require_refusal(
    settings: Settings, path: str, says: str, **changes: object
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_all_rows("dataset.path", settings(path=path, **changes))
    message = str(refused.value)
    assert matches(f"dataset.path={path}: {says}", message), message
    assert "\n" not in message


def broken_state(folder: Path) -> None:
    (folder / "state.json").write_text("{")


def missing_file(folder: Path) -> None:
    next(folder.glob("*.arrow")).unlink()


def truncated_file(folder: Path) -> None:
    file = next(folder.glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:-300])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (broken_state, "its state.json can't be read; save the data set again"),
        (missing_file, "data-00000-of-00001.arrow is missing; save the data set again"),
        (truncated_file, "no readable Arrow file data-00000-of-00001.arrow (…)"),
    ],
)
def test_a_damaged_saved_data_set_is_refused(
    settings: Settings, tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    from datasets import Dataset

    folder = tmp_path / "saved"
    Dataset.from_list(texts(3)).save_to_disk(str(folder))
    damage(folder)
    require_refusal(settings, str(folder), says)


def test_a_dictionary_of_data_sets_without_its_list_is_refused(
    settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "dataset_dict.json").write_text("[]")
    reason = "its dataset_dict.json can't be read; save the data set again"
    require_refusal(settings, str(tmp_path), reason)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("memory://none.jsonl", "there is no such file"),
        (
            "s3://bucket/rows.jsonl",
            "s3:// needs another package (Install s3fs to access S3)",
        ),
        ("gs://bucket/rows.jsonl", "gs:// needs another package (…gcsfs…)"),
        (
            "nothing://rows.jsonl",
            "can't be opened (ValueError: Protocol not known: nothing)",
        ),
        ("memory://rows.xml", f"must be a {FILE_TYPES}"),
        ("memory://bad.jsonl", "line 1 is no JSON object; …"),
        ("file:///none/rows.jsonl", "no such file or folder; allowed: …"),
    ],
)
def test_a_bad_url_is_refused(settings: Settings, url: str, says: str) -> None:
    with fsspec.open("memory://bad.jsonl", "wb") as stored:
        stored.write(b"1\n")
    require_refusal(settings, url, says)


@pytest.mark.parametrize("name", ["a" * 300 + ".jsonl", "a\0b.jsonl", "no/file.TXT.GZ"])
def test_a_path_that_no_file_can_have_is_refused(settings: Settings, name: str) -> None:
    require_refusal(settings, name, "no such file or folder; allowed: …")


def test_a_file_of_a_folder_that_cant_be_opened_is_refused(
    settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(ConfigError) as refused:
        load_all_rows("dataset.path", settings(path=str(tmp_path)))
    expected = (
        f"dataset.path={tmp_path}/a.jsonl: can't be read (No such file or directory)"
    )
    assert str(refused.value) == expected


@pytest.mark.parametrize(
    ("encoding", "says"),
    [
        (
            "utf-16",
            "line 1 is not UTF-16 text; it is UTF-8: dataset.encoding=null reads it",
        ),
        (
            "ascii",
            "line 1 is not ASCII text; it is UTF-8: dataset.encoding=null reads it",
        ),
    ],
)
def test_an_encoding_that_the_file_does_not_have_is_refused(
    settings: Settings, tmp_path: Path, encoding: str, says: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(GERMAN)
    require_refusal(settings, str(file), says, encoding=encoding)


@pytest.mark.parametrize("name", ["utf-9", "base64", "''", "windows"])
def test_a_name_of_no_text_encoding_is_refused_by_the_config(name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose("dataset.path=rows.jsonl", f"dataset.encoding={name}")
    shown = name.strip("'")
    assert str(refused.value).startswith(
        f"dataset.encoding={shown}: must be a text encoding"
    )


def test_numbers_that_json_does_not_have_are_read_where_no_format_uses_them(
    settings: Settings, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a", "score": NaN}\n')
    assert load_all_rows("dataset.path", settings(path=str(file))) == [{"text": "a"}]
    write_parquet(tmp_path / "rows.parquet", [{"text": "a", "score": float("nan")}])
    assert load_all_rows("dataset.path", settings(path=f"{tmp_path}/rows.parquet")) == [
        {"text": "a"}
    ]
    assert json.loads(file.read_text())
