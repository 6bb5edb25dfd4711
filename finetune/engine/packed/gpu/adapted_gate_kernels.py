"""Triton kernels of `adapted_gate`: they add the adapters' contributions to what they read."""

import triton
import triton.language as tl

from finetune.engine.packed.gpu.element_access import load_float32, store_rounded
from finetune.engine.packed.gpu.gated_product import activate
from finetune.engine.packed.gpu.lowrank_kernels import (
    contribution,
    load_adapter,
    load_tile,
)


@triton.jit
def _load_adapted(
    output, offsets, shrunk, b, rank, factor, span, table, tokens, features, token_mask,
    column_mask,
    RANK: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of a layer's output with the slot's contribution to these output features."""
    values = load_float32(output, offsets, token_mask[:, None] & column_mask[None, :])
    # B's offsets do not depend on the width, which is that of A.
    added = contribution(
        shrunk, b, rank, factor, span, table, tokens, features, 0, token_mask, column_mask,
        False, False, RANK, TOKENS, RANK, COLUMNS
    )  # fmt: skip
    return values + added


@triton.jit
def adapted_gate_kernel(
    product, gate, up, gate_shrunk, up_shrunk, gate_tables, up_tables, spans, tiles, table_stride,
    gate_stride, up_stride, width, gate_first, up_first,
    ACTIVATION: tl.constexpr, ALIGNED: tl.constexpr, RANK: tl.constexpr, TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """product = activation(gate) · up for a tile of tokens and some blocks of columns."""
    first, span, gate_table = load_tile(
        tiles, spans, gate_tables, table_stride, tl.program_id(1)
    )
    _, _, up_table = load_tile(tiles, spans, up_tables, table_stride, tl.program_id(1))
    dtype: tl.constexpr = gate.dtype.element_ty
    gate_b, gate_rank, gate_factor = load_adapter(
        span, gate_table, dtype, False, ALIGNED
    )
    up_b, up_rank, up_factor = load_adapter(span, up_table, dtype, False, ALIGNED)
    # Each program has some tokens of a tile.
    first += tl.program_id(2) * TOKENS
    # Offsets may be too large for 32 bits.
    tokens = first.to(tl.int64) + tl.arange(0, TOKENS)
    token_mask = tokens < tl.load(span + 1)
    rows = tokens[:, None]
    begin = tl.program_id(0) * COLUMNS * BLOCKS
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        columns = begin + block * COLUMNS + tl.arange(0, COLUMNS)
        column_mask = columns < width
        mask = token_mask[:, None] & column_mask[None, :]
        g = _load_adapted(
            gate, rows * gate_stride + columns[None, :],
            gate_shrunk, gate_b, gate_rank, gate_factor, span, gate_table, tokens,
            gate_first + columns, token_mask, column_mask, RANK, TOKENS, COLUMNS
        )  # fmt: skip
        u = _load_adapted(
            up, rows * up_stride + columns[None, :],
            up_shrunk, up_b, up_rank, up_factor, span, up_table, tokens,
            up_first + columns, token_mask, column_mask, RANK, TOKENS, COLUMNS
        )  # fmt: skip
        product_offsets = rows * width + columns[None, :]
        store_rounded(product, product_offsets, activate(g, ACTIVATION)[0] * u, mask)


@triton.jit
def adapted_gate_backward_kernel(
    grad_product, grad_shrunk, down_tables, gate, up, gate_shrunk, up_shrunk, gate_tables,
    up_tables, spans, tiles, table_stride, gate_stride, up_stride, width, gate_first, up_first,
    DROPOUT: tl.constexpr, ACTIVATION: tl.constexpr, ALIGNED: tl.constexpr, RANK: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of gate and up in their places, and the product in the place of its gradient."""
    first, span, gate_table = load_tile(
        tiles, spans, gate_tables, table_stride, tl.program_id(1)
    )
    _, _, up_table = load_tile(tiles, spans, up_tables, table_stride, tl.program_id(1))
    _, _, down_table = load_tile(
        tiles, spans, down_tables, table_stride, tl.program_id(1)
    )
    dtype: tl.constexpr = gate.dtype.element_ty
    gate_b, gate_rank, gate_factor = load_adapter(
        span, gate_table, dtype, False, ALIGNED
    )
    up_b, up_rank, up_factor = load_adapter(span, up_table, dtype, False, ALIGNED)
    down_a, down_rank, down_factor = load_adapter(
        span, down_table, dtype, True, ALIGNED
    )
    # Each program has some tokens of a tile.
    first += tl.program_id(2) * TOKENS
    tokens = first.to(tl.int64) + tl.arange(0, TOKENS)
    token_mask = tokens < tl.load(span + 1)
    rows = tokens[:, None]
    begin = tl.program_id(0) * COLUMNS * BLOCKS
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        columns = begin + block * COLUMNS + tl.arange(0, COLUMNS)
        column_mask = columns < width
        mask = token_mask[:, None] & column_mask[None, :]
        product_offsets = rows * width + columns[None, :]
        gate_offsets = rows * gate_stride + columns[None, :]
        up_offsets = rows * up_stride + columns[None, :]
        grad = load_float32(grad_product, product_offsets, mask)
        grad += contribution(
            grad_shrunk, down_a, down_rank, down_factor, span, down_table, tokens,
            columns, width, token_mask, column_mask,
            True, DROPOUT, RANK, TOKENS, RANK, COLUMNS
        )  # fmt: skip
        g = _load_adapted(
            gate, gate_offsets, gate_shrunk, gate_b, gate_rank, gate_factor,
            span, gate_table, tokens, gate_first + columns, token_mask, column_mask,
            RANK, TOKENS, COLUMNS
        )  # fmt: skip
        u = _load_adapted(
            up, up_offsets, up_shrunk, up_b, up_rank, up_factor,
            span, up_table, tokens, up_first + columns, token_mask, column_mask,
            RANK, TOKENS, COLUMNS
        )  # fmt: skip
        activated, derivative = activate(g, ACTIVATION)
        store_rounded(gate, gate_offsets, grad * u * derivative, mask)
        store_rounded(up, up_offsets, grad * activated, mask)
        store_rounded(grad_product, product_offsets, activated * u, mask)
