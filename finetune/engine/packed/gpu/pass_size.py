"""Sizes to which passes are padded, so that many passes have the same one.

A recorded pass (`recorded_pass`) can be replayed for every batch that fits into its size. What is
added are tokens, as a row of a slot without adapters, and empty rows of the kernels' tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch

from finetune.engine.packed.batch import PackedBatch, Span

STEPS = 16
"""Sizes between a power of two and the next one: at most 1/16 is padding."""

MIN_STEP = 128
"""Least number of tokens between two sizes."""

MIN_SPANS = 8
"""Least number of spans that a size has room for."""

MIN_RANK = 16
"""Least columns of the activations between A and B: as many as `tl.dot` needs."""

MAX_GROWTH = 2
"""A batch is padded to at most so many times its tokens."""


@dataclass(frozen=True)
class PassSize:
    """How many rows the tables of a pass have, and how many tokens it computes."""

    tokens: int
    slots: int
    """With that of the added tokens."""
    spans: int
    """With that of the added tokens; the last one is empty."""
    rank: int = MIN_RANK
    """Columns of the activations between A and B of all adapters."""

    def fits_into(self, other: "PassSize") -> bool:
        """Whether a batch of this size may be padded to another one."""
        return (
            self.tokens <= other.tokens <= MAX_GROWTH * self.tokens
            and self.slots <= other.slots
            and self.spans <= other.spans
            and self.rank <= other.rank
        )

    def tiles(self, tile_tokens: int) -> int:
        """The most tiles of tokens of one slot each."""
        return -(-self.tokens // tile_tokens) + self.slots

    def blocks(self, block: int) -> int:
        """The most blocks of tokens of one span each."""
        return -(-self.tokens // block) + self.spans


def pass_size(batch: PackedBatch, rank: int = MIN_RANK) -> PassSize:
    """Return the smallest size into which a batch fits.

    Args:
        batch: The packed batch.
        rank: Of the size.
    """
    tokens = batch.input_ids.shape[1]
    step = max(_power_of_two(tokens + 1) // 2 // STEPS, MIN_STEP)
    return PassSize(
        tokens=-(-tokens // step) * step,
        slots=_power_of_two(len(batch.batch_spans) + 1),
        spans=max(_power_of_two(len(batch.spans) + 2), MIN_SPANS),
        rank=rank,
    )


def padding_span(batch: PackedBatch, size: PassSize) -> Span:
    """The tokens that are added to a batch."""
    tokens = batch.input_ids.shape[1]
    return Span(
        start=tokens,
        length=size.tokens - tokens,
        prefix_start=tokens,
        prefix_length=0,
    )


def block_rows(ranges: Sequence[tuple[int, int]], block: int) -> torch.Tensor:
    """Cut ranges of tokens into blocks.

    Args:
        ranges: First token, and one past the last.
        block: The most tokens of a block.

    Returns:
        For each block the number of its range, and its first token [blocks, 2], int32.
    """
    bounds = numpy.array(ranges)
    counts = -(-(bounds[:, 1] - bounds[:, 0]) // block)
    numbers = numpy.repeat(numpy.arange(len(bounds)), counts)
    # The number of each block in its range.
    earlier = numpy.repeat(numpy.cumsum(counts) - counts, counts)
    places = numpy.arange(len(numbers)) - earlier
    firsts = bounds[numbers, 0] + places * block
    return torch.from_numpy(numpy.stack([numbers, firsts], 1).astype(numpy.int32))


def padded_rows(
    table: torch.Tensor, rows: int, row: Sequence[int] | None = None
) -> torch.Tensor:
    """Add rows to a table.

    Args:
        table: [rows, …].
        rows: How many there are then.
        row: What is added; None: zeros.
    """
    padded = table.new_zeros(rows, *table.shape[1:])
    padded[: len(table)] = table
    if row is not None:
        padded[len(table) :] = torch.tensor(row)
    return padded


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (number - 1).bit_length()
