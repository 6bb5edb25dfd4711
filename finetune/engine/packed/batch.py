"""A packed batch: rows of several runs as one sequence of tokens without padding.

Each row attends to itself only. A common prefix of the rows of one run's batch (a system prompt)
is computed once; all of these rows attend to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

from finetune.data.encoding import IGNORED
from finetune.data.lengths import common_prefix_length, computed_length
from finetune.model.device import to_device

Row = dict[str, list[int]]
"""A tokenised row: `input_ids` and `labels`."""


def packed_length(rows: Sequence[dict[str, Any]]) -> int:
    """Count the tokens that a batch takes in a packed batch, a common prefix once."""
    repetitions = max(len(rows) - 1, 0)
    row_tokens = sum(map(computed_length, rows))
    repeated_tokens = common_prefix_length(rows) * repetitions
    return row_tokens - repeated_tokens


@dataclass(frozen=True)
class Span:
    """Consecutive tokens with causal attention among themselves and to a shared prefix, if any.

    A span is a row, a row without its shared prefix, or a shared prefix.
    """

    start: int
    """First token."""
    length: int
    prefix_start: int
    """First token of the shared prefix; with none, that of the run's batch."""
    prefix_length: int
    """0: no shared prefix."""

    @property
    def stop(self) -> int:
        """One past the last token."""
        return self.start + self.length

    @property
    def prefix_stop(self) -> int:
        """One past the prefix's last token."""
        return self.prefix_start + self.prefix_length

    def moved(self, tokens: int) -> "Span":
        """The span so many tokens further on."""
        return Span(
            self.start + tokens,
            self.length,
            self.prefix_start + tokens,
            self.prefix_length,
        )

    def key_indices(self) -> torch.Tensor:
        """The tokens that the last query attends to: the prefix and the span itself [keys]."""
        prefix = torch.arange(self.prefix_start, self.prefix_stop)
        span = torch.arange(self.start, self.stop)
        return torch.cat([prefix, span])


@dataclass
class BatchLayout:
    """One run's batch without padding. Tokens and rows are counted from the batch's first ones."""

    spans: list[Span] = field(default_factory=list)
    span_rows: list[int] = field(default_factory=list)
    """The row of each span; of a shared prefix the first row that has it."""
    input_ids: list[int] = field(default_factory=list)
    next_labels: list[int] = field(default_factory=list)
    """The label that each token predicts; `IGNORED`: none."""
    row_count: int = 0
    target_count: int = 0
    """Answer tokens."""

    def add_group(self, rows: Sequence[Row]) -> None:
        """Append rows; their common prefix is computed once."""
        start = len(self.input_ids)
        prefix_length = common_prefix_length(rows)
        if prefix_length:
            # The prefix is a span of its own, to which no label belongs.
            prefix = Span(
                start=start,
                length=prefix_length,
                prefix_start=start,
                prefix_length=0,
            )
            self.spans.append(prefix)
            self.span_rows.append(self.row_count)
            self.input_ids += rows[0]["input_ids"][:prefix_length]
            self.next_labels += [IGNORED] * prefix_length
        for row in rows:
            self._add_row(row, start, prefix_length)

    def _add_row(
        self,
        row: Row,
        prefix_start: int,
        prefix_length: int,
    ) -> None:
        """Append a row without its shared prefix, up to the token that predicts its last answer."""
        length = computed_length(row)
        span = Span(
            start=len(self.input_ids),
            length=length - prefix_length,
            prefix_start=prefix_start,
            prefix_length=prefix_length,
        )
        self.spans.append(span)
        self.span_rows.append(self.row_count)
        self.input_ids += row["input_ids"][prefix_length:length]
        # The hidden state of a token predicts the label of the next one.
        labels = row["labels"][prefix_length + 1 : length + 1]
        # A row of a single token has no next one.
        self.next_labels += labels + [IGNORED] * (span.length - len(labels))
        self.target_count += len(labels) - labels.count(IGNORED)
        self.row_count += 1


def lay_out(rows: Sequence[Row], group_size: int | None = None) -> BatchLayout:
    """Lay out one run's batch.

    Args:
        rows: Those of the batch.
        group_size: How many rows after each other may share a prefix; None: all of the batch.
    """
    layout = BatchLayout()
    size = group_size or max(1, len(rows))
    for first in range(0, len(rows), size):
        layout.add_group(rows[first : first + size])
    return layout


def packed_spans(rows: Sequence[Row], shares_prefixes: bool = True) -> list[Span]:
    """Return the spans of one run's batch.

    Args:
        rows: Those of the batch.
        shares_prefixes: Whether a prefix that all rows share is computed once.
    """
    return lay_out(rows, None if shares_prefixes else 1).spans


@dataclass(frozen=True)
class BatchDevices:
    """Where a pass reads the tensors of its batch: the parts of a base may be on several GPUs."""

    embedding: torch.device
    first_block: torch.device
    last_block: torch.device
    head: torch.device

    @classmethod
    def all_on(cls, device: torch.device) -> "BatchDevices":
        """Where everything is on one device."""
        return cls(device, device, device, device)


class PackedBatch:
    """The tokens of several runs' batches, one batch after another, and where everything is."""

    def __init__(self, layouts: Sequence[BatchLayout], devices: BatchDevices) -> None:
        """Join the batches.

        Args:
            layouts: The batch of each run.
            devices: Where the tensors go.
        """
        self.batch_spans: list[tuple[int, int]] = []
        """The tokens of each run's batch: first, one past the last."""
        self.target_counts = [layout.target_count for layout in layouts]
        """How many answer tokens each run's batch has."""
        self.spans: list[Span] = []
        span_rows: list[int] = []
        input_ids: list[int] = []
        next_labels: list[int] = []
        row = 0
        for layout in layouts:
            token = len(input_ids)
            self.spans += [span.moved(token) for span in layout.spans]
            span_rows += [span_row + row for span_row in layout.span_rows]
            input_ids += layout.input_ids
            next_labels += layout.next_labels
            self.batch_spans.append((token, len(input_ids)))
            row += layout.row_count
        # For all rows at once: with many short ones, arrays of each cost more than the tokens.
        lengths = numpy.array([span.length for span in self.spans])
        row_starts = [span.start - span.prefix_length for span in self.spans]
        # As if each row stood alone: its first positions are those of its prefix.
        position_ids = numpy.arange(len(input_ids)) - numpy.repeat(row_starts, lengths)
        labels = _integers(next_labels)
        (positions,) = numpy.nonzero(labels != IGNORED)
        target_rows = numpy.repeat(span_rows, lengths)[positions]
        arrays = [
            labels[positions],
            target_rows,
            positions,
            position_ids,
            _integers(input_ids),
        ]
        tensors = _copied(
            arrays,
            [
                devices.head,
                devices.head,
                devices.last_block,
                devices.first_block,
                devices.embedding,
            ],
        )
        self.host_position_ids = torch.from_numpy(arrays[3])
        """`position_ids` in the host's memory [tokens]."""
        self.targets = tensors[0]
        """The answer tokens [answer tokens]."""
        self.target_rows = tensors[1]
        """The row of each answer token, counted over all batches [answer tokens]."""
        self.prediction_positions = tensors[2]
        """The token whose hidden state predicts each answer token [answer tokens]."""
        self.position_ids = tensors[3][None]
        """Position of each token in its own row [1, tokens]."""
        self.input_ids = tensors[4][None]
        """[1, tokens]."""


def pack_rows(
    batches: Sequence[Sequence[Row]],
    devices: torch.device | BatchDevices,
    group_sizes: Sequence[int | None] | None = None,
) -> PackedBatch:
    """Make a packed batch of rows.

    Args:
        batches: The rows of each run's batch.
        devices: Where the tensors go.
        group_sizes: For each batch how many rows after each other may share a prefix; None: all
            of the batch.
    """
    sizes = group_sizes or [None] * len(batches)
    layouts = [lay_out(rows, size) for rows, size in zip(batches, sizes, strict=True)]
    if isinstance(devices, torch.device):
        devices = BatchDevices.all_on(devices)
    return PackedBatch(layouts, devices)


def _integers(values: list[int]) -> numpy.ndarray:
    # Faster than `numpy.array`, which looks at all of them first.
    return numpy.fromiter(values, numpy.int64, len(values))


def _copied(
    arrays: Sequence[numpy.ndarray], devices: Sequence[torch.device]
) -> list[torch.Tensor]:
    """Copy arrays from the host, each to its device.

    A copy from another GPU would wait for what both have to compute.
    """
    tensors: dict[int, torch.Tensor] = {}
    for device in dict.fromkeys(devices):
        numbers = [n for n, other in enumerate(devices) if other == device]
        # One copy for all that go there: each copy is a launch.
        joined = numpy.concatenate([arrays[number] for number in numbers])
        sizes = [len(arrays[number]) for number in numbers]
        copied = torch.split(to_device(torch.from_numpy(joined), device), sizes)
        tensors |= dict(zip(numbers, copied, strict=True))
    return [tensors[number] for number in range(len(arrays))]
