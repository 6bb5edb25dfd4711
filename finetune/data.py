"""Rows from a file, a folder, the hub or `python_docs`: read, put into one form, split.

Neither torch nor transformers is imported here, so that a mistake in the data is said at once.
"""

import csv
import functools
import hashlib
import json
import logging
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config import ConfigError, DatasetSettings, refusal
from finetune.hub import fetch_dataset
from finetune.python_docs import question_answer_pairs

log = logging.getLogger(__name__)

Row = dict[str, Any]
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Rows:
    """The rows of a run, in one form: `text`, or `messages` of `role` and `content`."""

    train: list[Row]
    evaluation: list[Row]
    test: list[Row]
    dropped: dict[str, int]
    """How many rows were left out, by reason."""

    @property
    def counts(self) -> dict[str, object]:
        """Rows in each part, and what was left out."""
        sizes = {"train": len(self.train), "eval": len(self.evaluation), "test": len(self.test)}
        return {**sizes, "dropped": self.dropped}

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of every row of every part."""
        return fingerprint([self.train, self.evaluation, self.test])


def fingerprint(content: object) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]


def load_rows(settings: DatasetSettings) -> Rows:
    """Read and split the data set. Raises ConfigError that names the key, and the line or row, of what is wrong."""
    dropped: dict[str, int] = {}
    pool = _read_formatted("dataset.path", settings.path, settings, dropped)
    random.Random(f"split {settings.split_seed}").shuffle(pool)

    total = len(pool)
    test = _held_out("test", settings, pool, total, dropped)  # first: no other fraction changes which rows these are
    evaluation = _held_out("eval", settings, pool, total, dropped)
    seen = {fingerprint(row) for row in pool}
    evaluation = _unseen("eval", settings, evaluation, seen, dropped)
    test = _unseen("test", settings, test, seen, dropped)
    train = pool[: settings.limit]
    if not train:
        raise refusal("dataset.path", settings.path, "no rows are left to train on")
    _say_dropped(dropped)
    return Rows(train, evaluation, test, dropped)


def load_all_rows(key: str, settings: DatasetSettings) -> list[Row]:
    """Every row of `path`, none held out; `key` is what errors call it."""
    dropped: dict[str, int] = {}
    rows = _read_formatted(key, settings.path, settings, dropped)
    _say_dropped(dropped)
    return rows


def _say_dropped(dropped: dict[str, int]) -> None:
    for reason, count in dropped.items():
        log.info("data: left out %d %s", count, reason)


def _held_out(part: str, settings: DatasetSettings, pool: list[Row], total: int, dropped: dict[str, int]) -> list[Row]:
    """Rows from the user's own file, or a share of all rows that is taken out of the pool."""
    path: str | None = getattr(settings, f"{part}_path")
    fraction: float = getattr(settings, f"{part}_fraction")
    if path is not None:
        return _read_formatted(f"dataset.{part}_path", path, settings, dropped)
    count = round(fraction * total)
    if fraction > 0 and not 0 < count < len(pool):
        raise refusal(f"dataset.{part}_fraction", fraction, f"takes {count} of {total} rows; 0 means none wanted")
    taken, pool[:] = pool[:count], pool[count:]
    return taken


def _unseen(
    part: str, settings: DatasetSettings, rows: list[Row], seen: set[str], dropped: dict[str, int]
) -> list[Row]:
    """Held-out rows that stand nowhere else, so that nothing is measured on what was trained on."""
    kept = []
    for row in rows:
        mark = fingerprint(row)
        if mark not in seen:
            seen.add(mark)
            kept.append(row)
    if len(kept) < len(rows):
        dropped[f"{part} rows that also stand in training or twice"] = len(rows) - len(kept)
    if rows and not kept:
        key = f"{part}_path" if getattr(settings, f"{part}_path") else f"{part}_fraction"
        raise refusal(f"dataset.{key}", getattr(settings, key), f"all {len(rows)} rows also stand in training")
    return kept


# Reading


def _read_formatted(key: str, path: str, settings: DatasetSettings, dropped: dict[str, int]) -> list[Row]:
    """All rows of one source in one form. Rows with nothing to learn from are left out and counted."""
    rows: list[Row] = []
    total = 0
    format_name: str = settings.format
    for source, raw in _sources(key, path, settings):
        for number, row in enumerate(raw, start=1):
            if format_name == "auto":  # what the first row is, all are
                format_name = _detect(key, source, row, settings.text_field)
            formatted = _FORMATS[format_name](row, f"{key}={source}: row {number}", settings.text_field)
            if formatted is not None:
                rows.append(formatted)
            total += 1
    if not total:
        raise refusal(key, path, "holds no rows")
    if len(rows) < total:
        dropped[f"rows of {path} with nothing to learn from"] = total - len(rows)
    if not rows:
        raise refusal(key, path, f"no rows are left: none of {total} has any text to learn from")
    return rows


def _sources(key: str, path: str, settings: DatasetSettings) -> list[tuple[str, Iterable[Row]]]:
    """What a path stands for, each part by the name that errors call it: the files of a folder, or one source."""
    if path == "python_docs":
        return [(path, question_answer_pairs())]
    local = Path(path).expanduser()
    if local.is_dir():
        files = sorted(file for file in local.iterdir() if file.suffix in _READERS)
        if not files:
            raise refusal(key, path, f"the folder has no {' '.join(_READERS)} file")
        return [(str(file), _read_file(key, file)) for file in files]
    if local.is_file():
        return [(path, _read_file(key, local))]
    if local.suffix in _READERS or path.startswith((".", "/", "~")) or path.count("/") != 1:
        allowed = f"python_docs, a hub id (owner/name), a {' '.join(_READERS)} file, a folder"
        raise refusal(key, path, f"no such file or folder; allowed: {allowed}")
    return [(path, fetch_dataset(key, path, settings.name, settings.split))]


def _read_file(key: str, file: Path) -> Iterator[Row]:
    reader = _READERS.get(file.suffix)
    if reader is None:
        raise refusal(key, str(file), f"must be a {' '.join(_READERS)} file")
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


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines, ".json": _json_list, ".csv": _csv, ".parquet": _parquet,
}  # fmt: skip


# Formats: each makes one row of the common form, or None if there is nothing to learn from


def _detect(key: str, path: str, row: Row, text_field: str) -> str:
    columns = set(row)
    if text_field != "text" and text_field in columns:
        return "text"  # named on purpose
    if columns & {"messages", "conversations"}:
        return "chat"
    if {"prompt", "completion"} <= columns:
        return "prompt_completion"
    if {"instruction", "output"} <= columns:
        return "alpaca"
    if text_field in columns:
        return "text"
    raise refusal(
        "dataset.text_field",
        text_field,
        f"{key}={path} has no such field, and no chat either; its fields: {', '.join(map(str, row))}",
    )


def _field(row: Row, name: str, where: str) -> str:
    if name not in row:
        raise ConfigError(f"{where} has no field '{name}'; its fields: {', '.join(map(str, row))}")
    value = row[name]
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{where}: field '{name}' is no text but {type(value).__name__}")
    return value or ""


def _text(row: Row, where: str, text_field: str) -> Row | None:
    text = _field(row, text_field, where)
    return {"text": text} if text.strip() else None


def _chat(row: Row, where: str, _: str) -> Row | None:
    turns = row.get("messages", row.get("conversations"))
    if not isinstance(turns, list):
        raise ConfigError(f"{where} has no list 'messages' or 'conversations'; its fields: {', '.join(map(str, row))}")
    messages = [_message(turn, where) for turn in turns]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()  # nothing is learnt after the last answer
    return {"messages": messages} if any(m["role"] == "assistant" and m["content"].strip() for m in messages) else None


_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def _message(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise ConfigError(f"{where}: a message must have 'role' and 'content', or 'from' and 'value'")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise ConfigError(f"{where}: a message must have 'role' and 'content', or 'from' and 'value', as text")
    return {"role": _SHAREGPT_ROLES.get(role, role), "content": content}


def _question_and_answer(question: str, answer: str) -> Row | None:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns} if answer.strip() else None


def _prompt_completion(row: Row, where: str, text_field: str) -> Row | None:
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        return _chat({"messages": row["prompt"] + row["completion"]}, where, text_field)
    return _question_and_answer(_field(row, "prompt", where), _field(row, "completion", where))


def _alpaca(row: Row, where: str, _: str) -> Row | None:
    question = _field(row, "instruction", where)
    context = _field(row, "input", where) if "input" in row else ""
    return _question_and_answer(
        f"{question}\n\n{context}" if context.strip() else question, _field(row, "output", where)
    )


_FORMATS: dict[str, Callable[[Row, str, str], Row | None]] = {
    "text": _text, "chat": _chat, "prompt_completion": _prompt_completion, "alpaca": _alpaca,
}  # fmt: skip


def first_question(row: Row) -> str | None:
    """What a chat row asks first, None for plain text."""
    return next((turn["content"] for turn in row.get("messages", ()) if turn["role"] == "user"), None)
