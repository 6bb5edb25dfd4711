"""`gated_product` of linear layers' outputs, to which their adapters' contributions are added.

The contributions of the adapters to gate, up and (in the backward pass) the down layer's input are
computed where they are read, so that they never go through memory: in a feed-forward layer they
are the largest of all. The Triton kernels are in `adapted_gate_kernels`.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton

from finetune.engine.packed.gpu.adapted_gate_kernels import (
    adapted_gate_backward_kernel,
    adapted_gate_kernel,
)
from finetune.engine.packed.gpu.adapter_tables import AdapterTables
from finetune.engine.packed.gpu.gated_product import ACTIVATIONS
from finetune.engine.packed.gpu.launch import launch

TOKENS = 32
"""Most tokens of one program."""

COLUMNS = 64
"""Columns that a program computes at once."""

BLOCKS = 8
"""How often a program does: it looks up its slot's adapters once."""

STAGES = {16: 4, 32: 3}
"""By the adapters' rank: blocks whose loads are under way at once. With 2 in place of 4 the kernels
take a quarter longer on an H200."""


def gate_adds_adapters(tables: AdapterTables) -> bool:
    """Whether the gate's kernels add the contributions: B of a larger rank is more to load."""
    return tables.rank in STAGES


@dataclass(frozen=True)
class UnadaptedOutput:
    """A linear layer's output, or some of its columns, without its adapters' contribution."""

    output: torch.Tensor
    """[tokens, columns]; its rows may lie apart in memory."""
    shrunk: torch.Tensor
    """The layer's from `lowrank.shrink` [tokens, rank]."""
    layer: int
    """Its row in the slots' tables."""
    first_column: int
    """Of the layer's output features, the first one."""


def adapted_gate(
    gate: UnadaptedOutput,
    up: UnadaptedOutput,
    tables: AdapterTables,
    activation: str,
) -> torch.Tensor:
    """activation(gate) · up, elementwise, of both outputs with their contributions.

    Args:
        gate: [tokens, columns].
        up: As the gate.
        tables: The slots.
        activation: One of `gated_product.ACTIVATIONS`.

    Returns:
        [tokens, columns].
    """
    product = gate.output.new_empty(gate.output.shape)
    grid, constants = _shape(gate.output, tables, activation)
    arguments = (product, *_shared_arguments(gate, up, tables))
    launch(adapted_gate_kernel, grid, arguments, constants)
    return product


def adapted_gate_backward(
    grad_product: torch.Tensor,
    grad_shrunk: torch.Tensor,
    down: int,
    gate: UnadaptedOutput,
    up: UnadaptedOutput,
    tables: AdapterTables,
    activation: str,
) -> None:
    """Gradients of gate and up, which overwrite these; the product overwrites its gradient.

    Args:
        grad_product: Gradient of the product, without what comes through the down layer's
            adapters [tokens, columns].
        grad_shrunk: Of the down layer, from `lowrank.expand_backward` [tokens, rank].
        down: The down layer's row in the slots' tables.
        gate: As in the forward pass.
        up: As in the forward pass.
        tables: The slots.
        activation: As in the forward pass.
    """
    grid, constants = _shape(gate.output, tables, activation)
    arguments = (
        grad_product, grad_shrunk, tables.layers[down], *_shared_arguments(gate, up, tables),
    )  # fmt: skip
    constants = (tables.has_dropout, *constants)
    launch(adapted_gate_backward_kernel, grid, arguments, constants)


def _shared_arguments(
    gate: UnadaptedOutput, up: UnadaptedOutput, tables: AdapterTables
) -> tuple[Any, ...]:
    gate_table = tables.layers[gate.layer]
    up_table = tables.layers[up.layer]
    return (
        gate.output, up.output, gate.shrunk, up.shrunk, gate_table, up_table, tables.spans,
        tables.tiles, gate_table.stride(0), gate.output.stride(0), up.output.stride(0),
        gate.output.shape[1], gate.first_column, up.first_column,
    )  # fmt: skip


def _shape(
    gate: torch.Tensor, tables: AdapterTables, activation: str
) -> tuple[tuple[int, int, int], tuple[Any, ...]]:
    """The kernels' grid, and the constants that they have in common."""
    tokens = min(TOKENS, tables.tile_tokens)
    columns = triton.cdiv(gate.shape[1], COLUMNS * BLOCKS)
    grid = (columns, len(tables.tiles), tables.tile_tokens // tokens)
    constants = (
        ACTIVATIONS[activation], tables.aligned, tables.rank, tokens, COLUMNS, BLOCKS,
        STAGES[tables.rank],
    )  # fmt: skip
    return grid, constants
