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
    delta_rule_backward_kernel,
    delta_rule_kernel,
    grad_states_kernel,
    inverse_kernel,
)
from finetune.engine.packed.gpu.launch import launch
from finetune.engine.packed.gpu.pass_size import PassSize, padded_rows
from finetune.model.device import to_device

CHUNK = 32
"""Tokens that are computed at once."""

WARPS = 4
"""Warps of a program: the fastest on an H200."""

BLOCK = 64
"""Most columns of the values that a program has at once."""

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
        inverses = self._inverses(qkv, log_decays, rates, tables)
        output = qkv.new_empty(len(qkv), self.value_heads, self.value_columns)
        # A kernel takes a tensor for each argument, used or not.
        results = (output, output, output)
        self._launch(qkv, log_decays, rates, inverses, results, tables, False)
        return output

    def _inverses(
        self,
        qkv: torch.Tensor,
        log_decays: torch.Tensor,
        rates: torch.Tensor,
        tables: RowTables,
    ) -> torch.Tensor:
        """T of every chunk, float32 [chunks, value heads, CHUNK, CHUNK]."""
        chunks = len(tables.chunks)
        inverses = torch.empty(
            chunks, self.value_heads, CHUNK, CHUNK, device=qkv.device
        )
        arguments = (
            qkv, log_decays, rates, inverses, tables.chunks, qkv.stride(0), self.value_heads,
            self._group_size, self.key_width,
        )  # fmt: skip
        constants = (CHUNK, self.key_columns, DTYPES[qkv.dtype])
        grid = (chunks, self.value_heads, 1)
        launch(inverse_kernel, grid, arguments, constants, 4, 2)
        return inverses

    @property
    def _group_size(self) -> int:
        """Value heads that share a key head."""
        return self.value_heads // self.key_heads

    def _launch(
        self,
        qkv: torch.Tensor,
        log_decays: torch.Tensor,
        rates: torch.Tensor,
        inverses: torch.Tensor,
        results: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        tables: RowTables,
        store_states: bool,
    ) -> None:
        arguments = (
            qkv, log_decays, rates, inverses, *results, tables.rows, qkv.stride(0),
            self.value_heads, self._group_size, self.key_width, 2 * self.key_width,
            self.key_columns**-0.5,
        )  # fmt: skip
        constants = (store_states, *self._constants(qkv))
        launch(
            delta_rule_kernel, self._row_grid(tables), arguments, constants, WARPS, 1
        )

    def _constants(self, qkv: torch.Tensor) -> tuple[Any, ...]:
        """The kernels' constants CHUNK, KEYS, VALUES, BLOCK and DTYPE."""
        shapes = (CHUNK, self.key_columns, self.value_columns, self._block)
        return (*shapes, DTYPES[qkv.dtype])

    @property
    def _block(self) -> int:
        return min(BLOCK, self.value_columns)

    def _row_grid(self, tables: RowTables) -> tuple[int, int, int]:
        """Programs of the kernels that go over the chunks of a row."""
        blocks = self.value_columns // self._block
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
            rates: As in `forward`.
            tables: As in `forward`.

        Returns:
            Gradients of qkv, log decays and rates.
        """
        inverses = self._inverses(qkv, log_decays, rates, tables)
        states = qkv.new_empty(
            len(tables.chunks), self.value_heads, self.key_columns, self.value_columns
        )
        corrections = torch.empty_like(grad_output)
        results = (corrections, states, corrections)
        self._launch(qkv, log_decays, rates, inverses, results, tables, True)
        grad_states = torch.empty_like(states)
        grad_corrections = torch.empty_like(corrections)
        scan_arguments = (
            qkv, log_decays, rates, inverses, grad_output, grad_states, grad_corrections,
            tables.rows, qkv.stride(0), self.value_heads, self._group_size, self.key_width,
            self.key_columns**-0.5,
        )  # fmt: skip
        constants = self._constants(qkv)
        grid = self._row_grid(tables)
        launch(grad_states_kernel, grid, scan_arguments, constants, WARPS, 1)
        tokens = len(qkv)
        grad_qkv = qkv.new_empty(tokens, sum(self.widths))
        grad_queries, grad_keys, grad_values = torch.split(grad_qkv, self.widths, 1)
        # Of each value head; those that share a key head are summed below.
        head_queries = qkv.new_empty(tokens, self.value_heads, self.key_columns)
        head_keys = torch.empty_like(head_queries)
        grad_log_decays = torch.empty_like(log_decays)
        grad_rates = torch.empty_like(rates)
        arguments = (
            qkv, log_decays, rates, inverses, states, corrections, grad_output, grad_states,
            grad_corrections, head_queries, head_keys, grad_values, grad_log_decays, grad_rates,
            tables.chunks, qkv.stride(0), grad_values.stride(0), self.value_heads,
            self._group_size, self.key_width, 2 * self.key_width, self.key_columns**-0.5,
        )  # fmt: skip
        grid = (len(tables.chunks), self.value_heads, 1)
        launch(delta_rule_backward_kernel, grid, arguments, constants, WARPS, 1)
        for gradient, of_heads in (
            (grad_queries, head_queries),
            (grad_keys, head_keys),
        ):
            grouped = of_heads.view(tokens, self.key_heads, self._group_size, -1)
            gradient.copy_(grouped.sum(2).flatten(1))
        return grad_qkv, grad_log_decays, grad_rates
