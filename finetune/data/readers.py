"""Read rows from files, folders and the hub."""

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from finetune.compat import datasets_offline
from finetune.config.data_folder import SUFFIXES
from finetune.config.schema import DatasetSettings
from finetune.data.python_docs import question_answer_pairs
from finetune.data.types import Row
from finetune.errors import ConfigError, refusal
from finetune.files.hub import HUB_TIMEOUT, ask_hub


def open_sources(key: str, path: str, settings: DatasetSettings) -> list[tuple[str, Iterable[Row]]]:
    """What a path that is no folder stands for, by the name that errors call it."""
    if path == "python_docs":
        return [(path, question_answer_pairs())]
    local = Path(path).expanduser()
    if local.is_file():
        return [(path, _read_file(key, local))]
    if local.suffix in SUFFIXES or path.startswith((".", "/", "~")) or path.count("/") != 1:
        allowed = f"python_docs, a hub id (owner/name), a {' '.join(SUFFIXES)} file, a folder"
        raise refusal(key, path, f"no such file or folder; allowed: {allowed}")
    return [(path, fetch_dataset(key, path, settings.name, settings.split))]


def _read_file(key: str, file: Path) -> Iterator[Row]:
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise refusal(key, str(file), f"must be a {' '.join(SUFFIXES)} file")
    if file.stat().st_size == 0:
        raise refusal(key, str(file), "the file is empty")
    try:
        yield from reader(file)
    except _UnreadableError as error:
        raise refusal(key, str(file), str(error)) from None
    except UnicodeDecodeError as error:
        raise refusal(key, str(file), f"is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise refusal(key, str(file), f"line {error.lineno} is broken JSON ({error.msg})") from None


class _UnreadableError(Exception):
    """What is wrong with a file, for the caller who knows its key."""


def _json_lines(file: Path, expected: str = "a .jsonl file holds one object on each line") -> Iterator[Row]:
    with open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise _UnreadableError(f"line {number} is no whole JSON object ({error.msg}); {expected}") from None
                yield _require_object(row, "\\ud" in line.lower(), f"line {number}", expected)


def _json_list(file: Path) -> Iterator[Row]:
    """A JSON list of objects; a file of JSON lines is often called .json as well."""
    expected = "a .json file holds a list of objects, or one object on each line"
    text = file.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        yield from _json_lines(file, expected)
        return
    escaped = "\\ud" in text.lower()
    for number, row in enumerate(json.loads(text), start=1):
        yield _require_object(row, escaped, f"row {number}", expected)


def _require_object(row: object, escaped: bool, where: str, expected: str) -> Row:
    """Refuse what is no object, and (where any is escaped) half a surrogate pair: JSON can say it, no tokenizer can."""
    if not isinstance(row, dict):
        raise _UnreadableError(f"{where} is no JSON object; {expected}")
    if escaped:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _UnreadableError(f"{where} has half a surrogate pair, which is no text") from None
    return row


def _csv(file: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with open(file, encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            yield from reader
        except csv.Error as error:
            raise _UnreadableError(f"line {reader.line_num} is broken CSV ({error})") from None


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return iter(pyarrow.parquet.read_table(file).to_pylist())
    except pyarrow.ArrowInvalid as error:
        raise _UnreadableError(f"no readable Parquet file ({str(error).splitlines()[0]})") from None


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines, ".json": _json_list, ".csv": _csv, ".parquet": _parquet,
}  # fmt: skip


def fetch_dataset(key: str, path: str, name: str | None, split: str) -> Iterable[dict[str, Any]]:
    """Rows of a data set on the hub, from its cache if the hub does not answer."""
    from huggingface_hub import HfApi

    def load() -> Iterable[dict[str, Any]]:
        from datasets import load_dataset

        rows: Iterable[dict[str, Any]] = load_dataset(path, name, split=split)
        return rows

    def ask() -> Iterable[dict[str, Any]]:
        HfApi().dataset_info(path, timeout=HUB_TIMEOUT)
        return load()

    def in_cache() -> Iterable[dict[str, Any]]:
        with datasets_offline():
            return load()

    try:
        return ask_hub(key, path, ask, in_cache, f"{key}=FILE takes a .jsonl, .csv or .parquet file from this machine")
    except ValueError as error:  # datasets' words for an unknown split or name list what there is
        raise error if isinstance(error, ConfigError) else ConfigError(f"{key}={path}: {error}") from None
