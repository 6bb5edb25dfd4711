"""The tables by which the Triton kernels of `lowrank` find each slot's tokens and adapters."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import triton

from finetune.engine.packed.gpu.pass_size import (
    MIN_RANK,
    PassSize,
    block_rows,
    padded_rows,
)
from finetune.model.device import to_device

COLUMNS = 8
"""Integers of a layer in a slot's table. 0 to 3: addresses of A, B and their gradients; 4: rank, 0
where the layer has no adapter; 5: the adapter's number; 6: the bits of its scaling, a float64; 7:
unused, for rows of 64 bytes."""


MANY_TOKENS = 4096
"""Tokens of a pass from which tiles are large: few tokens make few tiles, and with small ones there
are enough to keep a large GPU busy."""


@dataclass(frozen=True)
class AdapterSpan:
    """The tokens of one slot in a pass, and its dropout."""

    start: int
    """First token."""
    stop: int
    """One past the last token."""
    dropout_key: int
    """63 bits that seed the dropout masks of this batch."""
    dropout: float

    def row(self) -> tuple[int, int, int, int]:
        """As the kernels read it: the dropout in units of 2**-32."""
        # Below 1, because the kernels divide by the share of elements that dropout keeps.
        dropout = min(self.dropout, 1 - 2**-20)
        # The kernels compare it with 32 random bits of each element.
        threshold = round(dropout * 2**32)
        return self.start, self.stop, self.dropout_key, threshold


@dataclass(frozen=True)
class SlotTable:
    """A slot's adapters as the kernels find them."""

    layers: torch.Tensor
    """On the device, with a row for each linear layer of the base [layers, COLUMNS], int64."""
    rank: int
    """The largest one."""
    aligned: bool
    """Whether all ranks are multiples of 8 and all addresses of 16 bytes: vector loads."""
    copies: dict[torch.device | str, torch.Tensor] = field(
        default_factory=dict, compare=False
    )
    """`layers` on other devices, where a base is spread over several."""

    def on(self, device: torch.device | str) -> torch.Tensor:
        """Return `layers` on a device, to which they are copied once."""
        if self.layers.device == device:
            return self.layers
        if device not in self.copies:
            self.copies[device] = self.layers.to(device)
        return self.copies[device]

    @classmethod
    def of(cls, layers: torch.Tensor, device: torch.device | str) -> "SlotTable":
        """Make the table of a slot.

        Args:
            layers: [layers, COLUMNS], int64 on the CPU.
            device: Of the passes.
        """
        ranks = layers[:, 4]
        # A slot's matrices are consecutive in one vector: an odd size misaligns the ones behind it.
        misaligned = (ranks % 8).any() | (layers[:, :4] % 16).any()
        return cls(to_device(layers, device), int(ranks.max()), not bool(misaligned))


def padded_rank(slot_tables: Sequence[SlotTable]) -> int:
    """Return the largest rank of several slots, rounded up: Triton's blocks are powers of 2."""
    largest: int = triton.next_power_of_2(max(table.rank for table in slot_tables))
    return max(MIN_RANK, largest)


def are_aligned(slot_tables: Sequence[SlotTable]) -> bool:
    """Whether all adapters of several slots are aligned (`SlotTable.aligned`)."""
    return all(table.aligned for table in slot_tables)


class AdapterTables:
    """The tables by which the kernels find each slot's tokens and adapters in a pass."""

    def __init__(
        self,
        spans: list[AdapterSpan],
        slot_tables: list[SlotTable],
        device: torch.device | str,
        size: PassSize | None = None,
    ) -> None:
        """Copy the tables to the device.

        Args:
            spans: One for each slot, in the order of their tokens.
            slot_tables: One for each slot.
            device: Of the pass.
            size: What the tables are padded to; None: they are not.
        """
        tokens = size.tokens if size else max(span.stop for span in spans)
        self.tile_tokens = 64 if tokens >= MANY_TOKENS else 16
        """Tokens of one program."""
        self.rank = size.rank if size else padded_rank(slot_tables)
        """Columns of the activations between A and B: the largest rank, rounded up."""
        self.aligned = are_aligned(slot_tables)
        """See `SlotTable.aligned`."""
        self.has_dropout = any(span.dropout for span in spans)
        span_rows = torch.tensor([span.row() for span in spans])
        tiles = _tile_rows(spans, self.tile_tokens)
        layers = torch.stack([table.on(device) for table in slot_tables])
        if size:
            layers = padded_rows(layers, size.slots)
            span_rows = padded_rows(span_rows, size.slots)
            no_tile = [size.slots - 1, size.tokens]
            tiles = padded_rows(tiles, size.tiles(self.tile_tokens), no_tile)
        self.spans = to_device(span_rows, device)
        """[slots, 4], as `AdapterSpan.row`."""
        self.tiles = to_device(tiles, device)
        """For each tile of tokens: its slot and its first token [tiles, 2]."""
        self._tables = layers

    @functools.cached_property
    def layers(self) -> tuple[torch.Tensor, ...]:
        """For each layer, its row in each slot's table [slots, COLUMNS]."""
        # Only where kernels are launched: a recorded pass has views of its own.
        return self._tables.unbind(1)

    def tensors(self) -> list[torch.Tensor]:
        """What differs between two passes of the same size."""
        return [self.spans, self.tiles, self._tables]


def _tile_rows(spans: list[AdapterSpan], tile_tokens: int) -> torch.Tensor:
    """The rows of `AdapterTables.tiles`. A tile has the tokens of one slot only."""
    return block_rows([(span.start, span.stop) for span in spans], tile_tokens)
