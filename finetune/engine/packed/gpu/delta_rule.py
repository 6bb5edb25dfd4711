"""The gated delta rule (Yang, Kautz and Hatamizadeh, 2025) for the rows of a packed batch on a GPU.

The Triton kernels are in `delta_rule_kernels`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from finetune.engine.packed.batch import Span
from finetune.engine.packed.gpu.delta_rule_kernels import (
    chunk_kernel,
    delta_rule_backward_kernel,
    delta_rule_kernel,
    grad_states_kernel,
    shared_heads_kernel,
)
from finetune.engine.packed.gpu.launch import launch
from finetune.engine.packed.gpu.pass_size import PassSize, padded_rows
from finetune.model.device import to_device

CHUNK = 32
"""Tokens that are computed at once: 32 or 64. With 64 the states take half the memory and the
kernels, on an H200, 3 % more time."""


@dataclass(frozen=True)
class Tiling:
    """How a kernel's work is cut."""

    block: int
    """The most columns of the values that a program has at once."""
    warps: int
    """Of a program."""
    stages: int
    """Of software pipelining."""


# Tilings of the kernels, in the order of their launches: the fastest on an H200.
CHUNKS = Tiling(block=0, warps=2, stages=1)
OUTPUTS = Tiling(block=64, warps=4, stages=2)
STATES = Tiling(block=64, warps=4, stages=2)
GRAD_STATES = Tiling(block=64, warps=4, stages=2)
BACKWARD = Tiling(block=128, warps=4, stages=1)
SHARED_HEADS = Tiling(block=0, warps=4, stages=1)

DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}


class RowTables:
    """The rows of a packed batch, and their chunks, as the kernels read them."""

    def __init__(
        self,
        spans: Sequence[Span],
        device: torch.device,
        size: PassSize | None = None,
    ) -> None:
        """Copy the tables to the device.

        Args:
            spans: The rows of the packed batch, in order; none shares a prefix.
            device: Where the tables go.
            size: What the tables are padded to, by empty rows and chunks; None: they are not.
        """
        rows: list[tuple[int, int, int]] = []
        chunks: list[tuple[int, int]] = []
        for span in spans:
            rows.append((span.start, span.stop, len(chunks)))
            for first in range(span.start, span.stop, CHUNK):
                chunks.append((first, span.stop))
        row_table = torch.tensor(rows, dtype=torch.int32)
        chunk_table = torch.tensor(chunks, dtype=torch.int32)
        if size:
            row_table = padded_rows(row_table, size.spans)
            chunk_table = padded_rows(chunk_table, size.blocks(CHUNK))
        self.rows = to_device(row_table, device)
        """For each row: start, stop, and the number of its first chunk [rows, 3]."""
        self.chunks = to_device(chunk_table, device)
        """For each chunk: its first token, and one past its row's last [chunks, 2]."""

    def tensors(self) -> list[torch.Tensor]:
        """What differs between two passes of the same size."""
        return [self.rows, self.chunks]


@dataclass(frozen=True)
class _Chunks:
    """What chunks have without their states; see `chunk_kernel`."""

    queries: torch.Tensor
    """Of their final length [tokens, columns]."""
    keys: torch.Tensor
    """Of length 1 [tokens, columns]."""
    sums: torch.Tensor
    """Of the log decays within a chunk, float32 [tokens, value heads]."""
    inverses: torch.Tensor
    """T [chunks, value heads, CHUNK, CHUNK]."""
    scores: torch.Tensor
    """[chunks, value heads, CHUNK, CHUNK]."""


@dataclass(frozen=True)
class DeltaRule:
    """The shapes of the heads."""

    key_heads: int
    value_heads: int
    key_columns: int
    value_columns: int

    @property
    def key_width(self) -> int:
        """Columns of all keys."""
        return self.key_heads * self.key_columns

    @property
    def widths(self) -> list[int]:
        """Columns of all queries, keys and values."""
        return [
            self.key_width,
            self.key_width,
            self.value_heads * self.value_columns,
        ]

    def forward(
        self,
        qkv: torch.Tensor,
        log_decays: torch.Tensor,
        rates: torch.Tensor,
        tables: RowTables,
    ) -> torch.Tensor:
        """Compute the outputs of all rows.

        Args:
            qkv: Queries, keys and values [tokens, columns].
            log_decays: Logarithms of the states' decays, float32 [tokens, value heads].
            rates: Of the states' updates, between 0 and 1, float32 [tokens, value heads].
            tables: The rows.

        Returns:
            [tokens, value heads, value columns].
        """
        chunks = self._chunks(qkv, log_decays, rates, tables)
        output = qkv.new_empty(len(qkv), self.value_heads, self.value_columns)
        # A kernel takes a tensor for each argument, used or not.
        results = (output, output, output)
        self._go_over_rows(qkv, chunks, results, tables, OUTPUTS, False)
        return output

    def _chunks(
        self,
        qkv: torch.Tensor,
        log_decays: torch.Tensor,
        rates: torch.Tensor,
        tables: RowTables,
    ) -> _Chunks:
        """Compute what does not depend on states."""
        count = len(tables.chunks)
        squares = (count, self.value_heads, CHUNK, CHUNK)
        chunks = _Chunks(
            queries=qkv.new_empty(len(qkv), self.key_width),
            keys=qkv.new_empty(len(qkv), self.key_width),
            sums=torch.empty_like(log_decays),
            inverses=qkv.new_empty(squares),
            scores=qkv.new_empty(squares),
        )
        arguments = (
            qkv, log_decays, rates, chunks.queries, chunks.keys, chunks.sums, chunks.inverses,
            chunks.scores, tables.chunks, qkv.stride(0), self.value_heads, self._group_size,
            self.key_width, self._scale,
        )  # fmt: skip
        constants = (CHUNK, self.key_columns, DTYPES[qkv.dtype])
        grid = (count, self.key_heads, 1)
        launch(chunk_kernel, grid, arguments, constants, CHUNKS.warps, CHUNKS.stages)
        return chunks

    @property
    def _group_size(self) -> int:
        """Value heads that share a key head."""
        return self.value_heads // self.key_heads

    @property
    def _scale(self) -> float:
        """The length of a query."""
        return float(self.key_columns**-0.5)

    def _go_over_rows(
        self,
        qkv: torch.Tensor,
        chunks: _Chunks,
        results: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        tables: RowTables,
        tiling: Tiling,
        store_states: bool,
    ) -> None:
        """Compute outputs, or states and corrections."""
        arguments = (
            qkv, chunks.queries, chunks.keys, chunks.sums, chunks.inverses, chunks.scores,
            *results, tables.rows, qkv.stride(0), self.value_heads, self._group_size,
            2 * self.key_width,
        )  # fmt: skip
        constants = (store_states, *self._constants(qkv, tiling))
        grid = self._row_grid(tables, tiling)
        launch(
            delta_rule_kernel, grid, arguments, constants, tiling.warps, tiling.stages
        )

    def _constants(self, qkv: torch.Tensor, tiling: Tiling) -> tuple[Any, ...]:
        """The kernels' constants CHUNK, KEYS, VALUES, BLOCK and DTYPE."""
        shapes = (CHUNK, self.key_columns, self.value_columns, self._block(tiling))
        return (*shapes, DTYPES[qkv.dtype])

    def _block(self, tiling: Tiling) -> int:
        return min(tiling.block, self.value_columns)

    def _row_grid(self, tables: RowTables, tiling: Tiling) -> tuple[int, int, int]:
        """Programs of the kernels that go over the chunks of a row."""
        blocks = self.value_columns // self._block(tiling)
        return len(tables.rows), self.value_heads, blocks

    def backward(
        self,
        grad_output: torch.Tensor,
        qkv: torch.Tensor,
        log_decays: torch.Tensor,
        rates: torch.Tensor,
        tables: RowTables,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute the gradients of `forward`; what is between is computed again.

        Args:
            grad_output: [tokens, value heads, value columns].
            qkv: As in `forward`.
            log_decays: As in `forward`.
            rates: As in `forward`. The gradient of a rate of 0 is 0, as a sigmoid's is there.
            tables: As in `forward`.

        Returns:
            Gradients of qkv, log decays and rates.
        """
        chunks = self._chunks(qkv, log_decays, rates, tables)
        states = qkv.new_empty(
            len(tables.chunks), self.value_heads, self.value_columns, self.key_columns
        )
        corrections = torch.empty_like(grad_output)
        results = (corrections, states, corrections)
        self._go_over_rows(qkv, chunks, results, tables, STATES, True)
        grad_qkv = qkv.new_empty(len(qkv), sum(self.widths))
        grad_values = grad_qkv[:, 2 * self.key_width :]
        grad_states = torch.empty_like(states)
        self._go_back_over_rows(chunks, grad_output, grad_states, grad_values, tables)
        queries, keys, sums = chunks.queries, chunks.keys, chunks.sums
        # Makes room.
        del chunks
        # Of each value head.
        head_queries = qkv.new_empty(len(qkv), self.value_heads, self.key_columns)
        head_keys = torch.empty_like(head_queries)
        grad_log_decays = torch.empty_like(log_decays)
        grad_rates = torch.empty_like(rates)
        arguments = (
            queries, keys, sums, rates, states, corrections, grad_output, grad_states,
            grad_values, head_queries, head_keys, grad_log_decays, grad_rates, tables.chunks,
            grad_values.stride(0), self.value_heads, self._group_size,
        )  # fmt: skip
        grid = (len(tables.chunks), self.value_heads, 1)
        constants = self._constants(qkv, BACKWARD)
        warps, stages = BACKWARD.warps, BACKWARD.stages
        launch(delta_rule_backward_kernel, grid, arguments, constants, warps, stages)
        self._sum_heads(qkv, head_queries, head_keys, grad_qkv, tables)
        return grad_qkv, grad_log_decays, grad_rates

    def _go_back_over_rows(
        self,
        chunks: _Chunks,
        grad_output: torch.Tensor,
        grad_states: torch.Tensor,
        grad_values: torch.Tensor,
        tables: RowTables,
    ) -> None:
        """Compute the gradients of states and values, from the rows' last chunks to their first."""
        arguments = (
            chunks.queries, chunks.keys, chunks.sums, chunks.inverses, chunks.scores,
            grad_output, grad_states, grad_values, tables.rows, grad_values.stride(0),
            self.value_heads, self._group_size,
        )  # fmt: skip
        grid = self._row_grid(tables, GRAD_STATES)
        constants = self._constants(grad_output, GRAD_STATES)
        warps, stages = GRAD_STATES.warps, GRAD_STATES.stages
        launch(grad_states_kernel, grid, arguments, constants, warps, stages)

    def _sum_heads(
        self,
        qkv: torch.Tensor,
        head_queries: torch.Tensor,
        head_keys: torch.Tensor,
        grad_qkv: torch.Tensor,
        tables: RowTables,
    ) -> None:
        """Compute the gradients of queries and keys from those of each value head."""
        arguments = (
            qkv, head_queries, head_keys, grad_qkv, tables.chunks, qkv.stride(0),
            grad_qkv.stride(0), self.value_heads, self._group_size, self.key_width, self._scale,
        )  # fmt: skip
        grid = (len(tables.chunks), self.key_heads, 1)
        constants = (CHUNK, self.key_columns)
        warps, stages = SHARED_HEADS.warps, SHARED_HEADS.stages
        launch(shared_heads_kernel, grid, arguments, constants, warps, stages)
