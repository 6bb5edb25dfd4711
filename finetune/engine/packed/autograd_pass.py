"""A pass of the autograd backend in progress: whose tokens are where."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.engine.packed.attention import PackedAttention

if TYPE_CHECKING:
    from finetune.engine.packed.slot import Slot


@dataclass(frozen=True)
class SlotSpan:
    """The tokens of one slot in a pass."""

    slot: "Slot"
    start: int
    stop: int
    """One past the last token."""
    dropout_step: int | None
    """None: no dropout."""
    row: int = 0
    """Number of the row among the slot's, in a layer that computes each row by itself."""


@dataclass(frozen=True)
class Pass:
    """A forward or backward pass in progress."""

    spans: list[SlotSpan]
    training: bool
    attention: PackedAttention
    rows: list[tuple[int, int]]
    """First token of each row, and one past its last, in the order of the slots."""

    def of_row(self, number: int) -> "Pass":
        """The pass of one row alone, whose first token has the number 0."""
        start, stop = self.rows[number]
        (span,) = [span for span in self.spans if span.start <= start < span.stop]
        first_row = next(
            index for index, row in enumerate(self.rows) if row[0] == span.start
        )
        row_span = SlotSpan(
            slot=span.slot,
            start=0,
            stop=stop - start,
            dropout_step=span.dropout_step,
            row=span.row + number - first_row,
        )
        return Pass([row_span], self.training, self.attention, [(0, stop - start)])
