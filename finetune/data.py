"""Rows from a file, a folder, the hub or `python_docs`: read, split, formatted, tokenised, put in order.

Reading and splitting import neither torch nor transformers, so that a mistake in the data is said at once.
"""

import csv
import hashlib
import json
import logging
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config import ConfigError, DatasetSettings, refusal
from finetune.hub import cache_folder, fetch_dataset
from finetune.python_docs import question_answer_pairs

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Row = dict[str, Any]
Messages = list[dict[str, str]]
IGNORED = -100
"""The label of a token that the loss leaves out."""


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

    @property
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
    evaluation = _held_out("eval", settings, pool, total, dropped)
    test = _held_out("test", settings, pool, total, dropped)
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
    raw = list(_read(key, path, settings))
    if not raw:
        raise refusal(key, path, "holds no rows")
    format_name = settings.format if settings.format != "auto" else _detect(key, path, raw[0], settings.text_field)
    form = _FORMATS[format_name]
    rows = []
    for number, row in enumerate(raw, start=1):
        formatted = form(row, f"{key}={path}: row {number}", settings.text_field)
        if formatted is not None:
            rows.append(formatted)
    if len(rows) < len(raw):
        dropped[f"rows of {path} with nothing to learn from"] = len(raw) - len(rows)
    if not rows:
        raise refusal(key, path, f"no rows are left: none of {len(raw)} has any text to learn from")
    return rows


def _read(key: str, path: str, settings: DatasetSettings) -> Iterable[Row]:
    if path == "python_docs":
        return question_answer_pairs()
    local = Path(path).expanduser()
    if local.is_dir():
        files = sorted(file for file in local.iterdir() if file.suffix in _READERS)
        if not files:
            raise refusal(key, path, f"the folder has no {' '.join(_READERS)} file")
        return (row for file in files for row in _read_file(key, file))
    if local.is_file():
        return _read_file(key, local)
    if local.suffix in _READERS or path.startswith((".", "/", "~")) or path.count("/") != 1:
        allowed = f"python_docs, a hub id (owner/name), a {' '.join(_READERS)} file, a folder"
        raise refusal(key, path, f"no such file or folder; allowed: {allowed}")
    return fetch_dataset(key, path, settings.name, settings.split)


def _read_file(key: str, file: Path) -> Iterator[Row]:
    reader = _READERS.get(file.suffix)
    if reader is None:
        raise refusal(key, str(file), f"must be a {' '.join(_READERS)} file")
    if file.stat().st_size == 0:
        raise refusal(key, str(file), "the file is empty")
    try:
        for number, row in reader(file):
            if not isinstance(row, dict):
                raise refusal(key, str(file), f"line {number} is no JSON object")
            yield row
    except _UnreadableError as error:
        raise refusal(key, str(file), str(error)) from None
    except UnicodeDecodeError as error:
        raise refusal(key, str(file), f"is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise refusal(key, str(file), f"line {error.lineno} is broken JSON ({error.msg})") from None


class _UnreadableError(Exception):
    """What is wrong with a file, for the caller who knows its key."""


def _json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    with open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    error.lineno = number
                    raise


def _json_list(file: Path) -> Iterator[tuple[int, Any]]:
    """A JSON list of objects; a file of JSON lines is often called .json as well."""
    text = file.read_text(encoding="utf-8-sig")
    return enumerate(json.loads(text), start=1) if text.lstrip().startswith("[") else _json_lines(file)


def _csv(file: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(sys.maxsize)
    with open(file, encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise _UnreadableError(f"line {reader.line_num} is broken CSV ({error})") from None


def _parquet(file: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return enumerate(pyarrow.parquet.read_table(file).to_pylist(), start=1)
    except pyarrow.ArrowInvalid as error:
        raise _UnreadableError(f"no readable Parquet file ({str(error).splitlines()[0]})") from None


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _json_lines, ".json": _json_list, ".csv": _csv, ".parquet": _parquet,
}  # fmt: skip


# Formats: each makes one row of the common form, or None if there is nothing to learn from


def _detect(key: str, path: str, row: Row, text_field: str) -> str:
    columns = set(row)
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


# Tokens

ENCODING = 1
"""Counted up when tokenisation changes, so that no cached rows of the old kind are used."""


def tokenize(part: str, rows: list[Row], tokenizer: "PreTrainedTokenizerBase", settings: DatasetSettings) -> "Dataset":
    """`input_ids` and `labels` of each row (with packing: of each sequence, and its rows' `seq_lengths`), cached.

    Labels equal the ids where the loss counts and are -100 elsewhere: of chats the assistant's tokens count,
    the end-of-turn token among them, as with TRL's prompt and completion columns; of plain text all do. Rows
    are cut to `max_length` tokens, and left out if no label remains.
    """
    from datasets import Dataset, disable_progress_bars, load_from_disk

    disable_progress_bars()
    if not rows:
        return Dataset.from_dict({"input_ids": [], "labels": []})
    recipe = [
        ENCODING,
        rows,
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        settings.max_length,
        settings.packing,
    ]
    place = cache_folder() / "tokens" / fingerprint(recipe)
    if not place.exists():
        encoded = [_encode(row, tokenizer) for row in rows]
        cut = [(ids[: settings.max_length], labels[: settings.max_length]) for ids, labels in encoded]
        kept = [(ids, labels) for ids, labels in cut if any(label != IGNORED for label in labels[1:])]
        if len(kept) < len(rows):
            log.info("data: left out %d %s rows with no answer within dataset.max_length", len(rows) - len(kept), part)
        if rows and not kept:
            raise refusal(
                "dataset.max_length", settings.max_length, f"leaves no {part} row an answer's token to learn from"
            )
        dataset = Dataset.from_dict({"input_ids": [ids for ids, _ in kept], "labels": [labels for _, labels in kept]})
        if settings.packing and kept:
            from trl import pack_dataset

            dataset = pack_dataset(dataset, settings.max_length)
        # Drawn up aside and renamed: a reader never sees half of it, and of two writers the first wins.
        draft = place.with_name(f"{place.name}.{os.getpid()}")
        dataset.save_to_disk(str(draft))
        try:
            os.rename(draft, place)
        except OSError:
            shutil.rmtree(draft)
    return load_from_disk(str(place))


def _encode(row: Row, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    if "text" in row:
        ids = tokenizer(_ended(row["text"], tokenizer))["input_ids"]
        return ids, list(ids)
    if tokenizer.chat_template is None:
        return _encode_plain(row["messages"], tokenizer)
    return _encode_chat(row["messages"], tokenizer)


def _encode_plain(messages: Messages, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """One question and its answer for a base without a chat template: the answer follows the question's text."""
    if len(messages) != 2:
        raise ConfigError("model.chat_template=null: this tokenizer has none, and the chats have more than two turns")
    question, answer = (message["content"] for message in messages)
    prompt = tokenizer(question)["input_ids"]
    ids = tokenizer(_ended(question + answer, tokenizer))["input_ids"]
    start = _common_prefix(prompt, ids)
    return ids, [IGNORED] * start + ids[start:]


def _encode_chat(messages: Messages, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """A chat by the tokenizer's template, labelled where the assistant speaks.

    An answer begins where the chat and the chat so far with a generation prompt diverge, and ends where the
    next turn begins. Templates that render an answer otherwise once it is history (they drop its reasoning)
    leave no such stretch for it: then only the last answer is learnt.
    """

    def render(turns: Messages, ask: bool = False) -> list[int]:
        ids: list[int] = tokenizer.apply_chat_template(turns, add_generation_prompt=ask, return_dict=False)
        return ids

    ids = render(messages)
    labels = [IGNORED] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant" and turn > 0:
            prompt = render(messages[:turn], ask=True)
            start = _common_prefix(prompt, ids)
            if start < len(prompt):  # the template moved something: the answer begins where another one would differ
                other = [*messages[:turn], {**message, "content": "\0"}, *messages[turn + 1 :]]
                start = max(start, _common_prefix(render(other), ids))
            end = len(ids) if turn == len(messages) - 1 else _common_prefix(render(messages[: turn + 1]), ids)
            labels[start:end] = ids[start:end]
    return ids, labels


def _ended(text: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text with the end token, so that generation learns to stop."""
    end = str(tokenizer.eos_token)
    return text if text.endswith(end) else text + end


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))


def epoch_order(lengths: Sequence[int], batch_rows: int, seed: int, epoch: int, group_by_length: bool) -> list[int]:
    """The order in which an epoch visits the rows: the same for every engine, whatever else draws random numbers.

    Grouped by length, rows are shuffled, sorted within stretches of 50 batches, and the longest batch comes
    first, as in transformers' `LengthGroupedSampler`.
    """
    import torch

    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    if group_by_length:
        from transformers.trainer_pt_utils import get_length_grouped_indices

        order: list[int] = get_length_grouped_indices(list(lengths), batch_rows, generator=generator)
        return order
    return [int(index) for index in torch.randperm(len(lengths), generator=generator)]
