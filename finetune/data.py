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
from finetune.folder import SUFFIXES, data_files, data_folder, named_parts
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
    files = _files_by_part(settings)
    pool = _read_formatted("dataset.path", settings.path, settings, dropped, files.get("train"))
    random.Random(f"split {settings.split_seed}").shuffle(pool)

    total = len(pool)
    # The test rows first: no other fraction changes which rows these are.
    test = _held_out("test", settings, files.get("test"), pool, total, dropped)
    evaluation = _held_out("eval", settings, files.get("eval"), pool, total, dropped)
    seen = {fingerprint(row) for row in pool}
    evaluation = _unseen("eval", settings, files.get("eval"), evaluation, seen, dropped)
    test = _unseen("test", settings, files.get("test"), test, seen, dropped)
    train = pool[: settings.limit]
    if not train:
        raise refusal("dataset.path", settings.path, "no rows are left to train on")
    _say_dropped(dropped)
    if len(train) < len(pool):
        log.info("data: training on %s of %s rows (dataset.limit)", f"{len(train):,}", f"{len(pool):,}")
    return Rows(train, evaluation, test, dropped)


def load_all_rows(key: str, settings: DatasetSettings) -> list[Row]:
    """Every row of `path`, none held out; of a folder those of its test files, where it has any.

    Args:
        key: What errors call the path.
        settings: The path, and how its rows are read.

    Raises:
        ConfigError: The path, a line or a row can't be read.
    """
    dropped: dict[str, int] = {}
    rows = _read_formatted(key, settings.path, settings, dropped, _files_of_part("test", key, settings.path))
    _say_dropped(dropped)
    return rows


def _say_dropped(dropped: dict[str, int]) -> None:
    for reason, count in dropped.items():
        log.info("data: left out %d %s", count, reason)


def _held_out(
    part: str, settings: DatasetSettings, files: list[Path] | None, pool: list[Row], total: int, dropped: dict[str, int]
) -> list[Row]:
    """Rows from the user's own file, from the folder's files of that name, or a share that is taken out of the pool."""
    path: str | None = getattr(settings, f"{part}_path")
    fraction: float = getattr(settings, f"{part}_fraction")
    if path is not None:
        key = f"dataset.{part}_path"
        return _read_formatted(key, path, settings, dropped, _files_of_part(part, key, path))
    if files:
        return _read_formatted("dataset.path", settings.path, settings, dropped, files)
    count = round(fraction * total)
    if fraction > 0 and not 0 < count < len(pool):
        raise refusal(f"dataset.{part}_fraction", fraction, f"takes {count} of {total} rows; 0 means none wanted")
    taken, pool[:] = pool[:count], pool[count:]
    return taken


def _unseen(
    part: str,
    settings: DatasetSettings,
    files: list[Path] | None,
    rows: list[Row],
    seen: set[str],
    dropped: dict[str, int],
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
        if getattr(settings, f"{part}_path") is None and files:
            reason = f"all {len(rows)} rows of {_names(files)} also stand in training"
            raise refusal("dataset.path", settings.path, reason)
        key = f"{part}_path" if getattr(settings, f"{part}_path") else f"{part}_fraction"
        raise refusal(f"dataset.{key}", getattr(settings, key), f"all {len(rows)} rows also stand in training")
    return kept


# Folders: files are what their names say


def _files_by_part(settings: DatasetSettings) -> dict[str, list[Path]]:
    """The files of the folder that `dataset.path` is, by the part that they are read for; empty for anything else.

    Files without a part's name train. A file that `eval_path` or `test_path` gives is left to that. What became of
    the files is said in one line where any has a part's name.
    """
    key, path = "dataset.path", settings.path
    folder = data_folder(path)
    if folder is None:
        return {}
    present = data_files(folder)
    if not present:
        raise refusal(key, path, f"the folder has no {' '.join(SUFFIXES)} file")
    parts = {
        file: _named_part(key, path, file) for file in data_files(folder, [settings.eval_path, settings.test_path])
    }
    files: dict[str, list[Path]] = {"train": [], "eval": [], "test": []}
    for file, part in parts.items():
        files[part or "train"].append(file)
    if not files["train"]:
        reason = f"the folder has {_names(present)}, and no file to train on"
        raise refusal(key, path, f"{reason}; {key}={present[0]} trains on it")
    if any(parts.values()):
        _say_files(settings, files, [file for file, part in parts.items() if part is None])
    return files


def _say_files(settings: DatasetSettings, files: dict[str, list[Path]], unnamed: list[Path]) -> None:
    """Which files became which part, and which are not used, in one line."""
    pieces = [f"train = {_names(files['train'])}"]
    if unnamed and len(unnamed) < len(files["train"]):
        pieces[0] += f" ({_names(unnamed)}: no part in the name)"
    for part in ("eval", "test"):
        path, fraction = getattr(settings, f"{part}_path"), getattr(settings, f"{part}_fraction")
        if path is not None:
            unused = f" (not used: {_names(files[part])})" if files[part] else ""
            pieces.append(f"{part} = dataset.{part}_path={path}{unused}")
        elif files[part]:
            pieces.append(f"{part} = {_names(files[part])}")
        elif fraction > 0:
            pieces.append(f"{part} = {fraction:.3g} of the training rows (dataset.{part}_fraction)")
    log.info("data: %s: %s", settings.path, "; ".join(pieces))


def _files_of_part(part: str, key: str, path: str) -> list[Path] | None:
    """Of a folder that is given for one part its files of that name, else all; None for anything but a folder."""
    folder = data_folder(path)
    if folder is None:
        return None
    files = data_files(folder)
    parts = {file: _named_part(key, path, file) for file in files}
    named = [file for file in files if parts[file] == part]
    if named and len(named) < len(files):
        log.info("data: %s=%s: %s only, named for it, of %d files", key, path, _names(named), len(files))
    elif not named and any(parts.values()):
        log.info("data: %s=%s: all %d files, as none is named %s", key, path, len(files), part)
    return named or files


def _named_part(key: str, path: str, file: Path) -> str | None:
    """The part that a file is named for, None where its name says none. Raises ConfigError where it says two."""
    parts = named_parts(file)
    if len(parts) > 1:
        raise refusal(key, path, f"{file.name} is named for {' and '.join(parts)}; give it the name of one part")
    return parts[0] if parts else None


def _names(files: list[Path]) -> str:
    """Files by their names, the first three of many."""
    shown = [file.name for file in files[:3]]
    rest = len(files) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


# Reading


def _read_formatted(
    key: str, path: str, settings: DatasetSettings, dropped: dict[str, int], files: list[Path] | None = None
) -> list[Row]:
    """All rows of one source in one form: of these files of a folder, or of whatever else the path stands for.

    Rows with nothing to learn from are left out and counted.
    """
    rows: list[Row] = []
    total = 0
    format_name: str = settings.format
    sources = _sources(key, path, settings) if files is None else _read_files(key, path, files)
    for source, raw in sources:
        for number, row in enumerate(raw, start=1):
            if format_name == "auto":  # what the first row is, all are
                format_name = _detect(key, source, row, settings.text_field)
            formatted = _FORMATS[format_name](row, f"{key}={source}: row {number}", settings.text_field)
            if formatted is not None:
                rows.append(formatted)
            total += 1
    shown = path if files is None else f"{path} ({_names(files)})"
    if not total:
        raise refusal(key, shown, "holds no rows")
    if len(rows) < total:
        reason = f"rows of {shown} with nothing to learn from"
        dropped[reason] = dropped.get(reason, 0) + total - len(rows)
    if not rows:
        raise refusal(key, shown, f"no rows are left: none of {total} has any text to learn from")
    return rows


def _sources(key: str, path: str, settings: DatasetSettings) -> list[tuple[str, Iterable[Row]]]:
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


def _read_files(key: str, path: str, files: list[Path]) -> list[tuple[str, Iterable[Row]]]:
    """The rows of a folder's files, each by the name that errors call it."""
    if not files:
        raise refusal(key, path, f"the folder has no {' '.join(SUFFIXES)} file")
    return [(str(file), _read_file(key, file)) for file in files]


def _read_file(key: str, file: Path) -> Iterator[Row]:
    reader = _READERS.get(file.suffix.lower())
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
