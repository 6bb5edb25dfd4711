"""Tokenise rows: encoded by several processes, cut, packed if asked for, and cached on disk."""

import dataclasses
import functools
import logging
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config.sections.dataset import DatasetSettings
from finetune.data.chat_template import FIXED_DATE, ChatTemplate
from finetune.data.encoding import Encoded, Encoder
from finetune.data.row_chunks import map_chunks
from finetune.data.row_file import StoredRows
from finetune.data.token_file import Tokens, TokenWriter
from finetune.data.token_report import (
    EXAMPLE_REASONS,
    LISTED_ROWS,
    NO_ANSWER_WITHIN,
    NOTHING_LEARNT,
    REFUSED,
    TOO_LONG,
    TokenReport,
)
from finetune.data.types import MESSAGE_KEYS, Row, fingerprint
from finetune.errors import ConfigError, refusal
from finetune.files.cache import load_cached

if TYPE_CHECKING:
    import numpy
    import pyarrow
    from transformers import PreTrainedTokenizerBase

    Numbers = numpy.ndarray[Any, numpy.dtype[Any]]

PACKED_BATCH = 1000
"""Packed sequences that are written at a time."""

log = logging.getLogger(__name__)

ENCODING_VERSION = 6
"""Increased when the encoding changes, so that tokens cached by an earlier version are not used."""


def tokenize(
    split: str,
    rows: StoredRows,
    tokenizer: "PreTrainedTokenizerBase",
    settings: DatasetSettings,
    variables: Mapping[str, Any] | None = None,
) -> Tokens:
    """Tokenise rows, or load their tokens from the cache.

    Args:
        split: The name of the split, for messages.
        rows: Rows in the common form.
        tokenizer: The base's tokenizer.
        settings: `max_length`, `packing`, and what is learnt, cut and skipped.
        variables: Variables of the chat template (`model.template_kwargs`).

    Returns:
        The examples in the order of the rows; with packing, sequences of examples.

    Raises:
        ConfigError: No row has a label within `max_length`, or a row can't be encoded. Of several
            such rows the first in the order of their sources is named.
    """
    if not rows:
        return Tokens.empty()
    key = _cache_key(rows, tokenizer, settings, variables)
    encode = _EncodeRows(tokenizer, dict(variables or {}), settings)

    def create(folder: Path) -> None:
        _encode_all(folder, split, rows, encode)

    tokens = load_cached("tokens", key, create, Tokens.load)
    if settings.packing:
        tokens = _pack(tokens, key, settings)
    for line in tokens.report.lines(split, settings.max_length):
        log.info("data: %s", line)
    return tokens


def _cache_key(
    rows: StoredRows,
    tokenizer: "PreTrainedTokenizerBase",
    settings: DatasetSettings,
    variables: Mapping[str, Any] | None,
) -> str:
    """A hash of everything that the tokens of single rows depend on."""
    special_tokens = {
        name: str(token) for name, token in tokenizer.special_tokens_map.items()
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend else _plain_vocabulary(tokenizer)
    return fingerprint(
        [
            ENCODING_VERSION,
            rows.key,
            vocabulary,
            tokenizer.chat_template,
            special_tokens,
            dict(variables or {}),
            settings.max_length,
            settings.loss_on,
            settings.on_too_long,
            settings.on_bad_row,
        ]
    )


def _plain_vocabulary(tokenizer: "PreTrainedTokenizerBase") -> list[object]:
    """What identifies a tokenizer without a backend."""
    return [type(tokenizer).__name__, tokenizer.get_vocab()]


def _encode_all(
    folder: Path, split: str, rows: StoredRows, encode: "_EncodeRows"
) -> None:
    """Encode rows into a folder.

    Raises:
        ConfigError: A row can't be encoded, or no row becomes an example.
    """
    import numpy

    # In this order the first row that is refused is the first of its file.
    sorted_rows = rows.in_source_order()
    _, positions = numpy.unique(rows.numbers, return_index=True)
    report = TokenReport()
    example_rows: list[Numbers] = []
    writer = TokenWriter(folder)
    for chunk in map_chunks(encode, sorted_rows, f"tokenising {split} rows"):
        report.add(chunk.report)
        sorted_positions = sorted_rows.numbers.searchsorted(chunk.rows)
        writer.write(chunk.record_batch(positions[sorted_positions]))
        example_rows.append(chunk.rows)
    if not report.examples:
        raise _nothing_to_learn(
            split,
            sorted_rows[0],
            encode.settings,
            report,
        )
    report.notes = _notes(report, encode.encoder)
    order = _order(rows.numbers, numpy.concatenate(example_rows))
    writer.finish(order, report)


def _order(row_numbers: "Numbers", example_rows: "Numbers") -> "Numbers":
    """Return the examples in the order of the rows, by their numbers.

    Args:
        row_numbers: The rows; a row may stand several times.
        example_rows: The row of each example, ascending. A row may have several examples, or none.
    """
    import numpy

    first = example_rows.searchsorted(row_numbers, "left")
    counts = example_rows.searchsorted(row_numbers, "right") - first
    # Each example's place among those of its row, as a running number without the rows before.
    running = numpy.arange(counts.sum())
    before = numpy.cumsum(counts) - counts
    return numpy.repeat(first - before, counts) + running


def _nothing_to_learn(
    split: str, row: Row, settings: DatasetSettings, report: TokenReport
) -> ConfigError:
    """The refusal of rows of which none becomes an example; it names the first one."""
    if set(report.left_out) == {NOTHING_LEARNT}:
        answers = "; ".join(f"{count} {why}" for why, count in report.unlearnt.items())
        reason = f"no {split} row has anything to learn: {answers}"
        return ConfigError(f"{row.place}: {reason}")
    reason = f"leaves no {split} row an answer's token to learn from"
    return refusal("dataset.max_length", settings.max_length, reason)


def _pack(tokens: Tokens, key: str, settings: DatasetSettings) -> Tokens:
    """Join examples to sequences of `max_length` tokens, or load these from the cache."""

    def create(folder: Path) -> None:
        import numpy
        from datasets import disable_progress_bars
        from trl import pack_dataset

        disable_progress_bars()
        packed = pack_dataset(tokens.to_dataset(), settings.max_length)
        writer = TokenWriter(folder)
        for table in packed.with_format("arrow").iter(PACKED_BATCH):
            for batch in table.combine_chunks().to_batches():
                writer.write(batch)
        writer.finish(numpy.arange(len(packed)), tokens.report)

    return load_cached(
        "tokens",
        f"{key}-packed",
        create,
        Tokens.load,
    )


@dataclass
class _EncodedChunk:
    """The examples of some rows, one after the other."""

    report: TokenReport
    rows: "Numbers"
    """The row of each example."""
    full_lengths: "Numbers"
    """The tokens of each example before it was cut."""
    offsets: "Numbers"
    """Where each example begins, and where the last one ends, in tokens."""
    ids: "Numbers"
    """The tokens of all examples."""
    labels: "Numbers"

    def record_batch(self, positions: "Numbers") -> "pyarrow.RecordBatch":
        """Return the examples as they are stored.

        Args:
            positions: Of each example's row, among all rows. The numbers of rows are not stored:
                other data sets, which have the same rows under other numbers, share the tokens.
        """
        import pyarrow

        offsets = pyarrow.array(self.offsets)
        columns = {
            "input_ids": pyarrow.ListArray.from_arrays(offsets, self.ids),
            "labels": pyarrow.ListArray.from_arrays(offsets, self.labels),
            "row": pyarrow.array(positions),
            "full_length": pyarrow.array(self.full_lengths),
        }
        return pyarrow.RecordBatch.from_pydict(columns)


@dataclass(frozen=True)
class _EncodeRows:
    """Encodes chunks of rows; it is sent to other processes before it encodes."""

    tokenizer: "PreTrainedTokenizerBase"
    variables: dict[str, Any]
    settings: DatasetSettings

    @functools.cached_property
    def encoder(self) -> Encoder:
        """Encodes rows."""
        return Encoder(self.tokenizer, self.variables, self.settings.loss_on)

    def __getstate__(self) -> dict[str, Any]:
        # An encoder holds compiled templates, which can't be pickled.
        return {name: value for name, value in vars(self).items() if name != "encoder"}

    def __call__(self, rows: Sequence[Row]) -> _EncodedChunk:
        import numpy

        assert isinstance(rows, StoredRows)
        report = TokenReport(rows=len(rows))
        example_rows, full_lengths, offsets = [], [], [0]
        ids, labels = array("i"), array("i")
        for number, row in zip(rows.numbers.tolist(), rows, strict=True):
            _note_row(row, report, self.encoder.template)
            for example in encode_row(row, self.encoder, self.settings, report):
                report.examples += 1
                ids.extend(example.ids[: self.settings.max_length])
                labels.extend(example.labels[: self.settings.max_length])
                offsets.append(len(ids))
                full_lengths.append(len(example.ids))
                example_rows.append(number)
        report.largest_id = max(ids, default=-1)
        return _EncodedChunk(
            report,
            numpy.array(example_rows, numpy.int64),
            numpy.array(full_lengths, numpy.int64),
            numpy.array(offsets, numpy.int32),
            numpy.array(ids, numpy.int32),
            numpy.array(labels, numpy.int32),
        )


def _note_row(row: Row, report: TokenReport, template: ChatTemplate | None) -> None:
    """Note in the report what a reader may want to know of a row's chat."""
    messages = row.get("messages")
    if messages is None:
        return
    report.chats += 1
    for message in messages:
        if template is not None and report.first_rendered is None:
            content = template.without_end(message)["content"]
            if any(token in content for token in template.turn_tokens):
                report.first_rendered = row.place
        role = message["role"]
        is_named = "name" in message and role in ("user", "assistant")
        if is_named and role not in report.named_roles:
            report.named_roles.append(role)
        if role == "system" and report.first_system is None:
            report.first_system = row.place
        if message.keys() <= MESSAGE_KEYS:
            continue
        for key in map(str, message):
            if key not in MESSAGE_KEYS and key not in report.message_keys:
                report.message_keys.append(key)


def encode_row(
    row: Row,
    encoder: Encoder,
    settings: DatasetSettings,
    report: TokenReport,
) -> Iterator[Encoded]:
    """Encode a row, and count in the report what is lost.

    Args:
        row: A row in the common form.
        encoder: Encodes it.
        settings: `max_length`, and what happens to longer rows and to rows that can't be encoded.
        report: Counts are added here.

    Yields:
        The row's examples, of any length; what stands beyond `max_length` is to be cut.

    Raises:
        ConfigError: The row can't be encoded or is too long, and its config says to refuse.
    """
    try:
        encoded = encoder.encode(row)
    except ConfigError as error:
        if settings.on_bad_row == "refuse":
            raise ConfigError(f"{row.place}: {error}") from None
        if len(report.skipped) < LISTED_ROWS:
            report.skipped.append(f"{row.place}: {error}")
        report.left_out[REFUSED] += 1
        return
    report.unlearnt += encoded.unlearnt
    limit = settings.max_length
    reasons = []
    examples = []
    for example in encoded.examples:
        is_long = limit is not None and len(example.ids) > limit
        if is_long and settings.on_too_long == "refuse":
            tokens = f"has {len(example.ids)} tokens"
            allowed = f"dataset.max_length={limit} (dataset.on_too_long=refuse)"
            raise ConfigError(f"{row.place}: {tokens}; {allowed}")
        if is_long and settings.on_too_long == "drop":
            reasons.append(TOO_LONG)
            continue
        if example.has_label(limit):
            report.cut += is_long
            examples.append(example)
            continue
        shorter = None
        if limit is not None:
            shorter = encoder.encode_without_oldest_turns(row, example.turns, limit)
        if shorter is None:
            reasons.append(NO_ANSWER_WITHIN)
            continue
        report.shortened += 1
        report.cut += limit is not None and len(shorter.ids) > limit
        left_out = example.turns - shorter.turns
        examples.append(dataclasses.replace(shorter, turns_left_out=left_out))
    if not examples:
        report.left_out[reasons[0] if reasons else NOTHING_LEARNT] += 1
    else:
        report.examples_left_out.update(EXAMPLE_REASONS[reason] for reason in reasons)
    yield from examples


def _notes(report: TokenReport, encoder: Encoder) -> list[str]:
    """What a reader should know of the chat template, one line each."""
    template = encoder.template
    if not report.chats:
        return []
    if template is None:
        unused = report.message_keys + ["name"] * bool(report.named_roles)
        reason = "fields of messages that are not used without a chat template"
        return [f"{reason}: {', '.join(unused)}"] if unused else []
    notes = []
    if template.writes_date:
        date = FIXED_DATE.date().isoformat()
        reason = f"always {date}, so that rows stay the same"
        notes.append(f"the chat template writes the date: {reason}")
    if report.first_system is not None and template.folds_system:
        effect = "they are put before the first question"
        place = f"(first in {report.first_system})"
        notes.append(f"the chat template has no system turns: {effect} {place}")
    if report.first_rendered is not None:
        effect = "texts that are rendered already are rendered again"
        place = f"(first in {report.first_rendered})"
        notes.append(f"messages hold tokens that begin turns {place}: {effect}")
    unused = [key for key in report.message_keys if not template.mentions(key)]
    if not all(template.writes_name(role) for role in report.named_roles):
        unused.append("name")
    if unused:
        names = ", ".join(unused)
        notes.append(f"fields of messages that the chat template does not use: {names}")
    if template.end is None:
        effect = "the tokenizer's is added"
        notes.append(f"the chat template writes no end after an answer: {effect}")
    return notes
