"""Tokenised rows: encoded, cut, packed if asked for, and cached on disk."""

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from finetune.config.sections.dataset import DatasetSettings
from finetune.data.chat_template import FIXED_DATE
from finetune.data.encoding import Encoded, Encoder
from finetune.data.types import MESSAGE_KEYS, Row, fingerprint
from finetune.errors import ConfigError, refusal
from finetune.files.atomic import create_folder
from finetune.files.cache import cache_folder

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

ENCODING_VERSION = 4
"""Increased when the encoding changes, so that tokens cached by an earlier version are not used."""

NO_ANSWER_WITHIN = "rows with no answer within dataset.max_length"
NOTHING_LEARNT = "rows of which no answer is learnt"
TOO_LONG = "rows longer than dataset.max_length"
REFUSED = "rows that can't be encoded (dataset.on_bad_row=skip)"
LISTED_ROWS = 3
"""How many skipped rows the log names."""


@dataclass
class TokenReport:
    """What became of rows when they were tokenised."""

    rows: int = 0
    """Rows that were given."""
    examples: int = 0
    """What training sees: a row can become several."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Rows that became no example, by reason."""
    cut: int = 0
    """Examples whose end is lost to `dataset.max_length`."""
    shortened: int = 0
    """Examples that lost their oldest turns, to leave room for their answer."""
    unlearnt: Counter[str] = field(default_factory=Counter)
    """Answers that are not learnt, by reason."""
    notes: list[str] = field(default_factory=list)
    """What else a reader should know of the encoding, one line each."""

    def lines(self, split: str, max_length: int | None) -> list[str]:
        """Return what the log says, one line for each count."""
        lines = [
            f"left out {count} {split} {reason}"
            for reason, count in self.left_out.items()
        ]
        if self.cut:
            rows = f"{self.cut} of {self.rows} {split} rows"
            lines.append(
                f"cut {rows} to dataset.max_length={max_length}: their end is lost"
            )
        if self.shortened:
            reason = "to keep the answer within dataset.max_length"
            lines.append(
                f"left out the oldest turns of {self.shortened} {split} rows, {reason}"
            )
        for reason, count in self.unlearnt.items():
            lines.append(f"{split}: not learnt: {count} {reason}")
        if self.examples > self.rows - self.left_out.total():
            reason = (
                "the chat template renders earlier answers otherwise, "
                "so each has one of its own"
            )
            lines.append(
                f"{self.examples} {split} examples of {self.rows} rows: {reason}"
            )
        return lines + self.notes


def tokenize(
    split: str,
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    settings: DatasetSettings,
    variables: Mapping[str, Any] | None = None,
) -> "Dataset":
    """Tokenise rows, or load their tokens from the cache.

    Args:
        split: The name of the split, for messages.
        rows: Rows in the common form.
        tokenizer: The base's tokenizer.
        settings: `max_length`, `packing`, and what is learnt, cut and skipped.
        variables: Variables of the chat template (`model.template_kwargs`).

    Returns:
        `input_ids` and `labels` of each example (see `Encoder`); with packing, of each sequence,
        and the lengths of its examples as `seq_lengths`. `report_of` says what became of the rows.

    Raises:
        ConfigError: No row has a label within `max_length`, or a row can't be encoded.
    """
    from datasets import Dataset, disable_progress_bars, load_from_disk

    disable_progress_bars()
    if not rows:
        return Dataset.from_dict({"input_ids": [], "labels": []})
    key = _cache_key(rows, tokenizer, settings, variables)
    folder = cache_folder() / "tokens" / key
    if not folder.exists():
        dataset = _encode_all(
            split, rows, Encoder(tokenizer, variables, settings.loss_on), settings
        )
        with create_folder(folder) as draft:
            dataset.save_to_disk(str(draft))
    tokens = load_from_disk(str(folder))
    for line in report_of(tokens).lines(split, settings.max_length):
        log.info("data: %s", line)
    return tokens


def report_of(tokens: "Dataset") -> TokenReport:
    """Return what became of the rows that `tokenize` has tokenised."""
    if not tokens.info.description:
        return TokenReport()
    values = json.loads(tokens.info.description)
    report = TokenReport(**values)
    report.left_out = Counter(values["left_out"])
    report.unlearnt = Counter(values["unlearnt"])
    return report


def left_out_count(tokens: "Dataset") -> int:
    """Return how many rows `tokenize` left out."""
    return report_of(tokens).left_out.total()


def as_list(tokens: "Dataset") -> list[dict[str, Any]]:
    """Return tokenised rows as a list, the same object for all runs that use the same data set.

    Converting ten thousand rows takes a second, so the list is kept as long as the data set is.
    """
    if tokens not in _lists:
        _lists[tokens] = tokens.to_list()
    return _lists[tokens]


_lists: "WeakKeyDictionary[Dataset, list[dict[str, Any]]]" = WeakKeyDictionary()


def _cache_key(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    settings: DatasetSettings,
    variables: Mapping[str, Any] | None,
) -> str:
    """A hash of everything that tokens depend on."""
    special_tokens = {
        name: str(token) for name, token in tokenizer.special_tokens_map.items()
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # A tokenizer without a backend is its class and its vocabulary.
    content = (
        backend.to_str()
        if backend
        else [type(tokenizer).__name__, tokenizer.get_vocab()]
    )
    return fingerprint(
        [
            ENCODING_VERSION,
            rows,
            content,
            tokenizer.chat_template,
            special_tokens,
            dict(variables or {}),
            settings.max_length,
            settings.packing,
            settings.loss_on,
            settings.on_too_long,
            settings.on_bad_row,
        ]
    )


def _encode_all(
    split: str,
    rows: Sequence[Row],
    encoder: Encoder,
    settings: DatasetSettings,
) -> "Dataset":
    """Encode rows, cut them to `max_length`, and pack them if `packing` is set."""
    from datasets import Dataset

    report = TokenReport()
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for _, example in encode_rows(split, rows, encoder, settings, report):
        columns["input_ids"].append(example.ids[: settings.max_length])
        columns["labels"].append(example.labels[: settings.max_length])
    dataset = Dataset.from_dict(columns)
    if settings.packing:
        from trl import pack_dataset

        dataset = pack_dataset(dataset, settings.max_length)
    dataset.info.description = json.dumps(
        vars(report)
    )  # saved with the rows, for `report_of`
    return dataset


def encode_rows(
    split: str,
    rows: Sequence[Row],
    encoder: Encoder,
    settings: DatasetSettings,
    report: TokenReport,
) -> Iterator[tuple[Row, Encoded]]:
    """Encode the rows of a split.

    Args:
        split: The name of the split, for messages.
        rows: Its rows in the common form; at least one.
        encoder: Encodes them.
        settings: What is learnt, cut and skipped.
        report: An empty one, which is filled.

    Yields:
        Each example with its row, of any length; what stands beyond `max_length` is to be cut.

    Raises:
        ConfigError: A row can't be encoded, or no row becomes an example.
    """
    report.rows = len(rows)
    if split == "train":  # the others are rendered by the same template
        report.notes = _notes(rows, encoder)
    for row in rows:
        for example in encode_row(row, encoder, settings, report):
            report.examples += 1
            yield row, example
    if report.examples:
        return
    if set(report.left_out) == {NOTHING_LEARNT}:
        answers = "; ".join(f"{count} {why}" for why, count in report.unlearnt.items())
        raise ConfigError(
            f"{place_of(rows[0])}: no {split} row has anything to learn: {answers}"
        )
    reason = f"leaves no {split} row an answer's token to learn from"
    raise refusal("dataset.max_length", settings.max_length, reason)


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
            raise ConfigError(f"{place_of(row)}: {error}") from None
        if report.left_out[REFUSED] < LISTED_ROWS:
            log.info("data: skipped %s: %s", place_of(row), error)
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
            raise ConfigError(f"{place_of(row)}: {tokens}; {allowed}")
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
    yield from examples


def place_of(row: Row) -> str:
    """Where a row stands, for messages: `FILE: row 3`."""
    return row.place if isinstance(row, Row) else "row"


def _notes(rows: Sequence[Row], encoder: Encoder) -> list[str]:
    """What a reader should know of the chat template, one line each."""
    template = encoder.template
    if template is None or all("text" in row for row in rows):
        return []
    notes = []
    if template.writes_date:
        date = FIXED_DATE.date().isoformat()
        notes.append(
            f"the chat template writes the date: always {date}, so that rows stay the same"
        )
    with_system = [row for row in rows if _has_system(row)]
    if with_system and template.folds_system:
        place = place_of(min(with_system, key=_order))
        notes.append(
            "the chat template has no system turns: they are put before the first question "
            f"(first in {place})"
        )
    unused = [key for key in _further_keys(rows) if not template.mentions(key)]
    if unused:
        notes.append(
            f"fields of messages that the chat template does not use: {', '.join(unused)}"
        )
    if template.end is None:
        notes.append(
            "the chat template writes no end after an answer: the tokenizer's is added"
        )
    return notes


def _further_keys(rows: Sequence[Row]) -> list[str]:
    """The keys of messages that the common form does not know, in the order of the rows."""
    keys: dict[str, None] = {}
    for row in rows:
        for message in row.get("messages", ()):
            if not message.keys() <= MESSAGE_KEYS:
                keys |= dict.fromkeys(key for key in message if key not in MESSAGE_KEYS)
    return list(map(str, keys))


def _order(row: Row) -> tuple[str, int]:
    """The order of rows in their sources."""
    return (row.source, row.number) if isinstance(row, Row) else ("", 0)


def _has_system(row: Row) -> bool:
    return any(message["role"] == "system" for message in row.get("messages", ()))
