"""Rows as the model sees them, and what becomes of all rows, before any weights load."""

import contextlib
import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from finetune.config.schema import RunConfig
from finetune.data.encoding import Encoded, Encoder
from finetune.data.row_file import StoredRows
from finetune.data.segments import Token, tokens_of
from finetune.data.token_file import Tokens
from finetune.data.token_report import TokenReport
from finetune.data.tokens import encode_row
from finetune.data.types import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.run.resources import SharedResources

LISTED = 3
"""How many of the longest and of the shortest rows are listed."""


@dataclass(frozen=True)
class ShownExample:
    """An example of a row that is shown."""

    split: str
    row: Row
    example: Encoded
    tokens: list[Token]
    """All of its tokens, the cut ones too."""
    index: int
    """Its number among the examples of its row, from 1."""
    count: int
    """The number of examples that its row has become."""

    @property
    def place(self) -> str:
        """Where its row stands; of several examples of a row also which one it is."""
        which = f", example {self.index} of {self.count}" if self.count > 1 else ""
        return f"{self.row.place}{which}"

    def to_dict(self) -> dict[str, Any]:
        """Return the example as `--json` prints it: what the model sees, without what is cut."""
        tokens = [token for token in self.tokens if not token.kind.cut]
        return {
            "part": self.split,
            "source": self.row.source,
            "number": self.row.number,
            "tokens": [token.text for token in tokens],
            "ids": [token.id for token in tokens],
            "trained": [token.kind.trained for token in tokens],
        }


class ExampleLength(NamedTuple):
    """How long an example is."""

    tokens: int
    """Before it is cut."""
    place: str
    """Where its row stands, as error messages name it."""


@dataclass
class Preview:
    """What becomes of the rows of a data set."""

    formats: list[str]
    """The formats of the training rows; several where sources differ."""
    rows: dict[str, int]
    """Source rows of each split."""
    examples: dict[str, int] = field(default_factory=dict)
    """What training and evaluation see of each split: a row can become several."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Rows of all splits that are not used, by reason."""
    examples_left_out: Counter[str] = field(default_factory=Counter)
    """Examples of all splits that are not used, of rows that have others, by reason."""
    cut: int = 0
    """Examples of all splits whose end is lost to `dataset.max_length`."""
    shortened: int = 0
    """Examples of all splits that lost their oldest turns."""
    unlearnt: Counter[str] = field(default_factory=Counter)
    """Answers of all splits that are not learnt, by reason."""
    notes: list[str] = field(default_factory=list)
    """What a run would log about its rows."""
    shown: list[ShownExample] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """The tokens of each example of the split that is shown, before it is cut."""
    longest: list[ExampleLength] = field(default_factory=list)
    """The longest examples of that split, of different rows."""
    shortest: list[ExampleLength] = field(default_factory=list)
    """The shortest ones."""

    def to_dict(self) -> dict[str, Any]:
        """Return the preview as `--json` prints it."""
        return {
            "format": ", ".join(self.formats),
            "parts": self.rows,
            "examples": self.examples["train"],
            "left_out": dict(self.left_out + self.examples_left_out),
            "cut": self.cut,
            "shortened": self.shortened,
            "unlearnt": dict(self.unlearnt),
            "notes": self.notes,
            "rows": [shown.to_dict() for shown in self.shown],
        }


@contextlib.contextmanager
def collect_notes() -> Iterator[list[str]]:
    """Collect what is logged about rows within the block, each line once."""
    notes: list[str] = []
    handler = logging.Handler(logging.INFO)

    def note(record: logging.LogRecord) -> None:
        _add_note(notes, record.getMessage().removeprefix("data: "))

    handler.emit = note  # type: ignore[method-assign]
    logger = logging.getLogger("finetune.data")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield notes
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def preview_rows(
    config: RunConfig,
    resources: "SharedResources",
    split: str,
    count: int,
    notes: list[str],
) -> Preview:
    """Encode all rows as a run would, and show the first rows of a split.

    Args:
        config: The run's config.
        resources: Rows and tokenizer.
        split: The split whose rows and lengths are shown.
        count: The number of rows that are shown.
        notes: Lines about the rows that were logged before; further ones are added.

    Raises:
        ConfigError: As a run's: a row can't be encoded, or a split has nothing to learn.
    """
    rows = resources.rows(config.dataset)
    tokenizer = resources.tokenizer(config.model)
    settings = dataclasses.replace(config.dataset, packing=False)
    unpacked = dataclasses.replace(config, dataset=settings)
    preview = Preview(
        formats=rows.train.format_names,
        rows={
            name: len(split_rows.in_source_order())
            for name, split_rows in rows.by_split.items()
        },
        left_out=Counter(rows.dropped),
        notes=notes,
    )
    for name, split_rows in rows.by_split.items():
        tokens = resources.tokens(name, split_rows, unpacked)
        report = tokens.report
        preview.examples[name] = len(tokens)
        preview.left_out += report.left_out
        preview.examples_left_out += report.examples_left_out
        preview.cut += report.cut
        preview.shortened += report.shortened
        preview.unlearnt += report.unlearnt
        for line in report.lines(name, config.dataset.max_length):
            _add_note(notes, line)
        if name == split:
            lengths = preview.lengths = tokens.full_lengths
            by_length = sorted(range(len(tokens)), key=lengths.__getitem__)
            preview.shortest = _distinct_rows(by_length, tokens, split_rows)
            preview.longest = _distinct_rows(by_length[::-1], tokens, split_rows)
    split_rows = rows.by_split[split]
    preview.shown = first_examples(config, tokenizer, split, split_rows, count)
    return preview


def _distinct_rows(
    order: Sequence[int], tokens: Tokens, rows: StoredRows
) -> list[ExampleLength]:
    """The first examples of an order that are of different rows.

    Args:
        order: Numbers of examples.
        tokens: The examples.
        rows: Their rows.
    """
    lengths, row_positions = tokens.full_lengths, tokens.row_positions
    distinct: dict[int, ExampleLength] = {}
    for example in order:
        position = row_positions[example]
        if position not in distinct:
            place = rows[position].place
            distinct[position] = ExampleLength(lengths[example], place)
        if len(distinct) == LISTED:
            break
    return list(distinct.values())


def first_examples(
    config: RunConfig,
    tokenizer: "PreTrainedTokenizerBase",
    split: str,
    rows: StoredRows,
    count: int,
) -> list[ShownExample]:
    """Return all examples of the first rows that have any.

    Args:
        config: The run's config.
        tokenizer: The base's tokenizer.
        split: The split of the rows.
        rows: Its rows; the first of their sources are shown, as training shuffles them.
        count: The number of rows.

    Raises:
        ConfigError: A row can't be encoded.
    """
    variables = config.model.template_kwargs
    encoder = Encoder(tokenizer, variables, config.dataset.loss_on)
    report = TokenReport()
    shown: list[ShownExample] = []
    for row in rows.in_source_order():
        if not count:
            break
        examples = list(encode_row(row, encoder, config.dataset, report))
        for index, example in enumerate(examples, start=1):
            tokens = tokens_of(example, tokenizer, config.dataset.max_length)
            shown.append(
                ShownExample(
                    split,
                    row,
                    example,
                    tokens,
                    index,
                    len(examples),
                )
            )
        count -= bool(examples)
    return shown


def _add_note(notes: list[str], line: str) -> None:
    if line not in notes:
        notes.append(line)
