"""The adapters of all slots at once on a GPU: each slot's matrices on that slot's tokens.

An adapter takes a linear layer's input through A down to its rank (`shrink`), and through B up to
its contribution to the layer's output (`expand`), as in Punica (Chen et al., 2023), S-LoRA (Sheng
et al., 2023) and vLLM's `lora/ops/triton_ops`, here with their backward passes. Layers with the
same input are computed together. Dropout falls on the input; its mask is drawn again wherever it
is needed. Only the activations between A and B are padded to a common rank. The Triton kernels are
in `lowrank_kernels`.
"""

import torch
import triton

from finetune.engine.packed.gpu.adapter_tables import AdapterTables
from finetune.engine.packed.gpu.launch import launch
from finetune.engine.packed.gpu.lowrank_kernels import (
    expand_backward_kernel,
    expand_kernel,
    gradient_a_kernel,
    shrink_kernel,
)

MAX_LAYERS = 4
"""Layers with the same input: queries, keys or decays, values and a gate."""


def shrink(
    x: torch.Tensor,
    tables: AdapterTables,
    layer: int,
    count: int,
) -> torch.Tensor:
    """Compute x Aᵀ with each slot's A, for several layers with the same input.

    Args:
        x: The layers' input [tokens, in_features].
        tables: The slots.
        layer: First layer, a row of the slots' tables; the others follow.
        count: Number of layers.

    Returns:
        [count, tokens, rank]; uninitialised where a slot has no adapter on a layer.
    """
    rank = tables.rank
    shrunk = torch.empty(count, len(x), rank, dtype=x.dtype, device=x.device)
    # The first layer's; the kernel goes on to the rows behind it.
    table = tables.layers[layer]
    rank_block = min(rank, 128)
    # Measured on an H200, as the other sizes of blocks here.
    inner_block, stages = 64, 4
    if tables.tile_tokens < 64:
        inner_block, stages = 256, _stages_of_wide_tiles(tables)
    rank_blocks = rank // rank_block
    grid = (count * rank_blocks, len(tables.tiles), 1)
    arguments = (
        x,
        shrunk,
        table,
        tables.spans,
        tables.tiles,
        table.stride(0),
        x.shape[1],
        len(x),
    )
    constants = (
        tables.has_dropout, tables.aligned, rank, tables.tile_tokens, rank_block, inner_block,
    )  # fmt: skip
    launch(shrink_kernel, grid, arguments, constants, stages=stages)
    return shrunk


def expand(
    shrunk: torch.Tensor,
    tables: AdapterTables,
    layer: int,
    width: int,
) -> torch.Tensor:
    """Compute the adapters' contribution to a layer's output: scaling · shrunk Bᵀ.

    Args:
        shrunk: The layer's from `shrink` [tokens, rank].
        tables: The slots.
        layer: The layer's row in the slots' tables.
        width: out_features of the layer.

    Returns:
        [tokens, out_features]; zero where a slot has no adapter on the layer.
    """
    y = shrunk.new_empty(len(shrunk), width)
    _launch_expand(
        y,
        shrunk[None],
        tables,
        layer,
        through_a=False,
    )
    return y


def add_expanded(
    residual: torch.Tensor,
    y: torch.Tensor,
    shrunk: torch.Tensor,
    tables: AdapterTables,
    layer: int,
) -> None:
    """Add a layer's output and its adapters' contribution to the residual stream, in place.

    The sum is rounded once: in 16 bits the contribution alone may be too small to change the much
    larger residual.

    Args:
        residual: [tokens, out_features].
        y: The layer's output without its adapters [tokens, out_features].
        shrunk: The layer's from `shrink` [tokens, rank].
        tables: The slots.
        layer: The layer's row in the slots' tables.
    """
    _launch_expand(
        y,
        shrunk[None],
        tables,
        layer,
        through_a=False,
        residual=residual,
    )


def expand_backward(
    grad_outputs: list[torch.Tensor],
    shrunk: torch.Tensor,
    tables: AdapterTables,
    layer: int,
) -> torch.Tensor:
    """Compute the gradients of `expand` for layers with the same input.

    Those of B replace the ones in the slots.

    Args:
        grad_outputs: Gradients of the layers' outputs [tokens, out_features], at most MAX_LAYERS.
        shrunk: From `shrink` [layers, tokens, rank].
        tables: The slots.
        layer: First layer, a row of the slots' tables.

    Returns:
        The gradient of `shrunk` [layers, tokens, rank]; uninitialised where that is.
    """
    grad_shrunk = torch.empty_like(shrunk)
    count, tokens, rank = shrunk.shape
    table = tables.layers[layer]
    widths = [grad.shape[1] for grad in grad_outputs]
    # Any tensor, where the kernel does not read it.
    unused = MAX_LAYERS - count
    tile_rank_block = min(rank, 128)
    rank_block = min(rank, 64)
    token_block = 64
    inner_block, outer_block, stages = _blocks_of_gradients(tables, max(widths))
    outer_blocks = triton.cdiv(max(widths), outer_block)
    tile_programs = len(tables.tiles) * count * (rank // tile_rank_block)
    block_programs = len(tables.spans) * count * outer_blocks * (rank // rank_block)
    arguments = (
        *grad_outputs,
        *[grad_outputs[0]] * unused,
        shrunk,
        grad_shrunk,
        table,
        tables.spans,
        tables.tiles,
        table.stride(0),
        *widths,
        *[widths[0]] * unused,
        tokens,
        len(tables.tiles),
        outer_blocks,
    )
    constants = (
        count, tables.aligned, rank, tables.tile_tokens, tile_rank_block, inner_block,
        token_block, rank_block, outer_block,
    )  # fmt: skip
    grid = (tile_programs + block_programs, 1, 1)
    launch(expand_backward_kernel, grid, arguments, constants, stages=stages)
    return grad_shrunk


def _blocks_of_gradients(tables: AdapterTables, width: int) -> tuple[int, int, int]:
    """Return the columns of a tile, those of a block of B, and the stages of pipelining."""
    stages = _stages_of_wide_tiles(tables)
    if tables.tile_tokens < 64:
        return 256, 64, stages
    # Many small programs where large ones would leave multiprocessors idle.
    if width < 1024:
        return 64, 64, stages + 1
    return 128, 128, stages + 1


def _stages_of_wide_tiles(tables: AdapterTables) -> int:
    """Return the stages of pipelining for tiles of 256 columns; narrower ones may have one more.

    A stage has a tile, and as many rows of A or B as the tile has columns: with more stages the
    smallest card has too little shared memory.
    """
    return 3 if tables.rank <= 64 else 2


def shrink_backward(
    grad_shrunk: torch.Tensor,
    tables: AdapterTables,
    layer: int,
    width: int,
) -> torch.Tensor:
    """Compute the gradient of the input through the adapters of all layers with this input.

    Args:
        grad_shrunk: From `expand_backward` [layers, tokens, rank].
        tables: The slots.
        layer: First layer, a row of the slots' tables.
        width: in_features of the layers.

    Returns:
        [tokens, in_features].
    """
    grad_x = grad_shrunk.new_empty(grad_shrunk.shape[1], width)
    _launch_expand(
        grad_x,
        grad_shrunk,
        tables,
        layer,
        through_a=True,
    )
    return grad_x


def shrink_weight_gradient(
    x: torch.Tensor,
    grad_shrunk: torch.Tensor,
    tables: AdapterTables,
    layer: int,
) -> None:
    """Compute the gradients of A of all layers with this input; they replace those in the slots.

    Args:
        x: The layers' input [tokens, in_features].
        grad_shrunk: From `expand_backward` [layers, tokens, rank].
        tables: The slots.
        layer: First layer, a row of the slots' tables.
    """
    count, tokens, rank = grad_shrunk.shape
    width = x.shape[1]
    table = tables.layers[layer]
    token_block = 64
    rank_block = min(rank, 64)
    outer_block = 64 if tables.tile_tokens < 64 else 128
    rank_blocks = rank // rank_block
    # By slot, not by tile: a program sums over all tokens of a slot, so no two programs add to the
    # same element.
    grid = (
        count * rank_blocks,
        triton.cdiv(width, outer_block),
        len(tables.spans),
    )
    arguments = (x, grad_shrunk, table, tables.spans, table.stride(0), width, tokens)
    constants = (
        tables.has_dropout,
        tables.aligned,
        rank,
        token_block,
        rank_block,
        outer_block,
    )
    launch(gradient_a_kernel, grid, arguments, constants)


def _launch_expand(
    y: torch.Tensor,
    shrunk: torch.Tensor,
    tables: AdapterTables,
    layer: int,
    through_a: bool,
    residual: torch.Tensor | None = None,
) -> None:
    count, tokens, rank = shrunk.shape
    width = y.shape[1]
    table = tables.layers[layer]
    rank_block = min(rank, 64)
    outer_block = 128
    # Through A the gradient of the input is computed: it is 0 where dropout dropped the input.
    dropout = tables.has_dropout and through_a
    grid = (triton.cdiv(width, outer_block), len(tables.tiles), 1)
    arguments = (
        y,
        # Any tensor, where the kernel does not read it.
        y if residual is None else residual,
        shrunk,
        table,
        tables.spans,
        tables.tiles,
        table.stride(0),
        width,
        tokens,
    )
    constants = (
        through_a, residual is not None, dropout, tables.aligned, count, rank,
        tables.tile_tokens, rank_block, outer_block,
    )  # fmt: skip
    launch(expand_kernel, grid, arguments, constants, stages=2)
