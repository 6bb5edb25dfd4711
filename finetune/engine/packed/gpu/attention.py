"""Attention of many short rows on a GPU: each row sees itself and the prefix that it shares.

FlashAttention-2 (Dao, 2023), forward and backward. A table of blocks lists only blocks that hold
tokens, and a shared prefix is read where it is instead of copied. The Triton kernels are in
`attention_kernels`.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import triton

from finetune.engine.packed.batch import Span
from finetune.engine.packed.gpu.attention_kernels import (
    attention_backward_key_value_kernel,
    attention_backward_query_kernel,
    attention_kernel,
)
from finetune.engine.packed.gpu.launch import launch
from finetune.engine.packed.gpu.pass_size import PassSize, block_rows, padded_rows
from finetune.engine.packed.gpu.rotary import apply_rotary
from finetune.model.device import to_device

LOG2_E = 1.4426950408889634
"""exp(x) = 2 ** (LOG2_E · x)."""


@dataclass(frozen=True)
class Steps:
    """How a kernel goes over the tokens that its program attends to, or that attend to it."""

    tokens: int
    """Of one step of its loop."""
    stages: int
    """Steps whose loads are under way at once."""


@dataclass(frozen=True)
class Tiling:
    """How the kernels are cut, so that they fit into a card's shared memory."""

    block: int
    """Tokens of one program."""
    forward: Steps
    query: Steps
    """Of the queries' backward kernel."""
    key: Steps
    """Of the keys' backward kernel, which keeps two results."""
    warps: int = 4
    """Warps of one program."""


# The fastest on an H200 that an RTX 4090's 99 KiB of shared memory allow.
TILINGS = {
    64: Tiling(64, forward=Steps(32, 3), query=Steps(32, 2), key=Steps(32, 2)),
    128: Tiling(64, forward=Steps(64, 2), query=Steps(32, 2), key=Steps(32, 1)),
    256: Tiling(32, forward=Steps(32, 2), query=Steps(32, 2), key=Steps(32, 2)),
    # With 4 warps, results would not fit into the registers.
    512: Tiling(
        16, forward=Steps(16, 1), query=Steps(16, 1), key=Steps(16, 1), warps=8
    ),
}
"""By the most columns of a head."""


def tiling_of(head_dim: int) -> Tiling:
    """Return how the kernels are cut for heads of some columns."""
    for most_columns, tiling in TILINGS.items():
        if head_dim <= most_columns:
            return tiling
    raise AssertionError(f"heads of {head_dim} columns")


class SpanTables:
    """The spans of a packed batch as the kernels read them."""

    def __init__(
        self,
        spans: Sequence[Span],
        position_ids: torch.Tensor,
        head_dims: Collection[int],
        size: PassSize | None = None,
    ) -> None:
        """Copy the tables to the device.

        Args:
            spans: The spans of the packed batch, in order.
            position_ids: Position of each token in its row [tokens].
            head_dims: Columns of the heads whose attention is computed.
            size: What the tables are padded to, by empty spans; None: they are not.
        """
        device = position_ids.device
        span_rows = torch.tensor(_span_rows(spans), dtype=torch.int32)
        if size:
            span_rows = padded_rows(span_rows, size.spans)
        self.spans = to_device(span_rows, device)
        """For each span: start, stop, prefix start, prefix stop, and one past the last token that
        attends to the span [spans, 5]."""
        self.query_blocks: dict[int, torch.Tensor] = {}
        """By the tokens of a block, for each block: its span and its first token [blocks, 2]. Those
        that see most keys come first, so that no program begins late that takes long."""
        self.key_blocks: dict[int, torch.Tensor] = {}
        """The same blocks; those that most queries see come first."""
        ranges = [(span.start, span.stop) for span in spans]
        for block in {tiling_of(head_dim).block for head_dim in head_dims}:
            rows = block_rows(ranges, block)
            by_keys, by_queries = _block_orders(rows.numpy(), span_rows.numpy())
            for tables, order in (
                (self.query_blocks, by_keys),
                (self.key_blocks, by_queries),
            ):
                table = rows[order]
                if size:
                    no_block = [size.spans - 1, 0]
                    table = padded_rows(table, size.blocks(block), no_block)
                tables[block] = to_device(table, device)
        self.position_ids = position_ids.to(torch.int32)

    def tensors(self) -> list[torch.Tensor]:
        """What differs between two passes of the same size."""
        blocks = [*self.query_blocks.values(), *self.key_blocks.values()]
        return [self.spans, *blocks, self.position_ids]


def _block_orders(
    blocks: numpy.ndarray, spans: numpy.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Order blocks of tokens by how many keys they see, and by how many queries see them.

    Args:
        blocks: [blocks, 2], without added rows.
        spans: [spans, 5].

    Returns:
        The numbers of the blocks in either order, the most first.
    """
    first = blocks[:, 1]
    start, _, prefix_start, prefix_stop, last_reader = spans[blocks[:, 0]].T
    keys = first - start + prefix_stop - prefix_start
    queries = last_reader - first
    by_keys, by_queries = (
        torch.from_numpy(numpy.argsort(-work, kind="stable"))
        for work in (keys, queries)
    )
    return by_keys, by_queries


def _span_rows(spans: Sequence[Span]) -> list[tuple[int, int, int, int, int]]:
    """The rows of `SpanTables.spans`."""
    # One past the last token that attends to the span that starts there. The rows that share a
    # prefix follow it at once, so all tokens between it and its last reader see it.
    last_readers = {span.start: span.stop for span in spans}
    for span in spans:
        if span.prefix_length:
            last_reader = last_readers[span.prefix_start]
            last_readers[span.prefix_start] = max(last_reader, span.stop)
    rows = []
    for span in spans:
        last_reader = last_readers[span.start]
        row = (span.start, span.stop, span.prefix_start, span.prefix_stop, last_reader)
        rows.append(row)
    return rows


@dataclass(frozen=True)
class AttentionTrace:
    """Attention's inputs and output, for its backward pass."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    """[tokens, heads, head_dim]"""
    log_sum_exp: torch.Tensor
    """Base-2 logarithms of the softmax's denominators, float32 [heads, tokens]."""
    scale: float
    window: int
    """0: no sliding window."""


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tables: SpanTables,
    scale: float,
    window: int | None,
) -> AttentionTrace:
    """Compute the attention of every span to itself and its shared prefix.

    Args:
        query: [tokens, heads, head_dim]; tokens may lie apart in memory.
        key: [tokens, key/value heads, head_dim]; as the query.
        value: As the key, with the same strides.
        tables: The spans.
        scale: Factor of the scores.
        window: Tokens that a query sees, itself included; None: all before it.

    Returns:
        The output, with what `attention_backward` needs.
    """
    tokens, heads, head_dim = query.shape
    output = query.new_empty(query.shape)
    log_sum_exp = torch.empty(heads, tokens, device=query.device)
    window_tokens = 0 if window is None else window
    group_size = heads // key.shape[1]
    tiling = tiling_of(head_dim)
    blocks = tables.query_blocks[tiling.block]
    arguments = (
        query, key, value, output, log_sum_exp, tables.position_ids, blocks, tables.spans,
        scale * LOG2_E, tokens, query.stride(0), key.stride(0), heads, group_size, head_dim,
        window_tokens,
    )  # fmt: skip
    grid = (len(blocks), heads, 1)
    steps = tiling.forward
    constants = _constants(head_dim, window_tokens, tiling, steps)
    launch(attention_kernel, grid, arguments, constants, tiling.warps, steps.stages)
    return AttentionTrace(
        query=query,
        key=key,
        value=value,
        output=output,
        log_sum_exp=log_sum_exp,
        scale=scale,
        window=window_tokens,
    )


def attention_backward(
    grad_output: torch.Tensor,
    trace: AttentionTrace,
    tables: SpanTables,
    gradients: Sequence[torch.Tensor],
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Compute the gradients of queries, keys and values.

    Args:
        grad_output: [tokens, heads, head_dim], contiguous.
        trace: From `attention`.
        tables: The spans.
        gradients: Set to the gradients of query, key and value; in their shapes and strides.
        rotation: cos and sin [tokens, rotary_dim] by which queries and keys were rotated: their
            gradients are then those before the rotation. None: they were not rotated.
    """
    query = trace.query
    tokens, heads, head_dim = query.shape
    key_heads = trace.key.shape[1]
    grad_query, grad_key, grad_value = gradients
    # Sum of output · gradient of each query (D in the paper): the first kernel writes it, the
    # second one reads it. So the order of the two launches matters.
    output_grad_sum = torch.empty_like(trace.log_sum_exp)
    # The kernels rotate back themselves where the two halves of a head are halves of the block.
    rotate_in_kernel = (
        rotation is not None
        and rotation[0].shape[1] == head_dim
        and _padded_head_dim(head_dim) == head_dim
    )
    # Any tensors, where the kernels don't read them.
    cos, sin = rotation or (query, query)
    tiling = tiling_of(head_dim)
    inputs = (
        cos, sin, query, trace.key, trace.value, grad_output, trace.log_sum_exp, output_grad_sum,
        tables.position_ids,
    )  # fmt: skip
    sizes = (
        tables.spans, trace.scale * LOG2_E, trace.scale, tokens, query.stride(0),
        trace.key.stride(0), heads, heads // key_heads, head_dim, trace.window,
    )  # fmt: skip
    constants = _constants(head_dim, trace.window, tiling, tiling.query)
    blocks = tables.query_blocks[tiling.block]
    query_arguments = (grad_query, trace.output, *inputs, blocks, *sizes)
    launch(
        attention_backward_query_kernel,
        (len(blocks), heads, 1),
        query_arguments,
        (rotate_in_kernel, *constants),
        tiling.warps,
        tiling.query.stages,
    )
    constants = _constants(head_dim, trace.window, tiling, tiling.key)
    blocks = tables.key_blocks[tiling.block]
    key_arguments = (grad_key, grad_value, *inputs, blocks, *sizes)
    # A program for each key head: it sums over the query heads that share it.
    launch(
        attention_backward_key_value_kernel,
        (len(blocks), key_heads, 1),
        key_arguments,
        (rotate_in_kernel, *constants),
        tiling.warps,
        tiling.key.stages,
    )
    if rotation is not None and not rotate_in_kernel:
        apply_rotary(grad_query, cos, sin, -1.0)
        apply_rotary(grad_key, cos, sin, -1.0)


def _constants(
    head_dim: int, window: int, tiling: Tiling, steps: Steps
) -> tuple[Any, ...]:
    """The kernels' constants WINDOW, HEAD_DIM, BLOCK and STEP."""
    return window > 0, _padded_head_dim(head_dim), tiling.block, steps.tokens


def _padded_head_dim(head_dim: int) -> int:
    """Columns of the kernels' blocks: a power of 2, and at least the 16 that `tl.dot` needs."""
    power: int = triton.next_power_of_2(head_dim)
    return max(16, power)
