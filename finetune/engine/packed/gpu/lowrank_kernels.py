"""Triton kernels of `lowrank`: products with each slot's A and B on that slot's tokens.

Every kernel finds a slot's matrices by its table (`lowrank.COLUMNS`), so slots may have different
ranks. `aligned` tables let the compiler use vector loads.
"""

import triton
import triton.language as tl


@triton.jit
def _hash(x):
    """Mix 32 bits (lowbias32: Wellons, 2018)."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _dropout_keeps(span, table, tokens, columns):
    """Which elements dropout keeps [tokens, columns].

    Depends on the slot's key for this batch, the adapter, the token within the slot and the column.
    """
    key, number = tl.load(span + 2), tl.load(table + 5)
    low, high = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
    row = _hash(tokens.to(tl.uint32) + _hash(low ^ _hash(high + number.to(tl.uint32))))
    # High bits of a product of two random odd numbers: a better hash for each element would be
    # most of the cost of dropout.
    uniform = (_hash(columns.to(tl.uint32)) | 1)[None, :] * (row | 1)[:, None]
    return uniform >= tl.load(span + 3).to(tl.uint32)


@triton.jit
def _matrix(table, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a column of the table, as a pointer."""
    address = tl.load(table + column).to(tl.pointer_type(dtype))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def _load_rank(table, ALIGNED: tl.constexpr):
    rank = tl.load(table + 4).to(tl.int32)
    if ALIGNED:
        rank = tl.multiple_of(rank, 8)
    return rank


@triton.jit
def _load_scaling(span, table):
    """The adapter's scaling, divided by the share of elements that dropout keeps."""
    scaling = tl.load(table + 6).to(tl.float64, bitcast=True).to(tl.float32)
    return scaling / (1 - tl.load(span + 3) / 4294967296)


@triton.jit
def _load_tile(tiles, spans, tables, stride):
    """This program's first token, and the rows of its slot in both tables."""
    tile = tiles + 2 * tl.program_id(1)
    slot = tl.load(tile)
    return tl.load(tile + 1), spans + 4 * slot, tables + slot * stride


@triton.jit(do_not_specialize=["token_count"])  # or multiples of 16 would be compiled separately
def shrink_kernel(
    x, shrunk, tables, spans, tiles, stride, width, token_count,
    THROUGH_B: tl.constexpr, DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, RANK: tl.constexpr,
    TOKENS: tl.constexpr, RANK_BLOCK: tl.constexpr, INNER_BLOCK: tl.constexpr,
):  # fmt: skip
    """shrunk = x Aᵀ of one layer for a tile of tokens; THROUGH_B: scaling · x B, its gradient."""
    first, span, table = _load_tile(tiles, spans, tables, stride)
    # Programs that read the same tokens are next to each other.
    layer = tl.program_id(0) // (RANK // RANK_BLOCK)
    table += 8 * layer
    rank = _load_rank(table, ALIGNED)
    if rank == 0:
        return
    start, stop = tl.load(span), tl.load(span + 1)
    tokens = first.to(tl.int64) + tl.arange(0, TOKENS)
    token_mask = tokens < stop
    ranks = tl.program_id(0) % (RANK // RANK_BLOCK) * RANK_BLOCK + tl.arange(0, RANK_BLOCK)
    total = tl.zeros((TOKENS, RANK_BLOCK), dtype=tl.float32)
    dtype: tl.constexpr = x.dtype.element_ty
    weight = _matrix(table, 1, dtype, ALIGNED) if THROUGH_B else _matrix(table, 0, dtype, ALIGNED)
    for begin in range(0, width, INNER_BLOCK):
        inner = begin + tl.arange(0, INNER_BLOCK)
        inner_mask = inner < width
        mask = token_mask[:, None] & inner_mask[None, :]
        values = tl.load(x + tokens[:, None] * width + inner[None, :], mask=mask, other=0.0)
        if DROPOUT:
            keeps = _dropout_keeps(span, table, tokens - start, inner)
            values = tl.where(keeps, values, tl.zeros_like(values))
        if THROUGH_B:
            weight_offsets = inner[:, None] * rank + ranks[None, :]
        else:
            weight_offsets = ranks[None, :] * width + inner[:, None]
        weight_mask = inner_mask[:, None] & (ranks < rank)[None, :]
        weights = tl.load(weight + weight_offsets, mask=weight_mask, other=0.0)
        total = tl.dot(values, weights, total, input_precision="ieee")
    if THROUGH_B:
        total *= _load_scaling(span, table)
    rows = layer.to(tl.int64) * token_count + tokens[:, None]
    address = shrunk + rows * RANK + ranks[None, :]
    tl.store(address, total.to(shrunk.dtype.element_ty), mask=token_mask[:, None])


@triton.jit(do_not_specialize=["token_count"])  # or multiples of 16 would be compiled separately
def expand_kernel(
    y, shrunk, tables, spans, tiles, stride, width, token_count,
    THROUGH_A: tl.constexpr, DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, LAYERS: tl.constexpr,
    RANK: tl.constexpr, TOKENS: tl.constexpr, RANK_BLOCK: tl.constexpr, OUTER_BLOCK: tl.constexpr,
):  # fmt: skip
    """y = scaling · shrunk Bᵀ for a tile of tokens; THROUGH_A: the sum of shrunk A over layers."""
    first, span, table = _load_tile(tiles, spans, tables, stride)
    start, stop = tl.load(span), tl.load(span + 1)
    tokens = first.to(tl.int64) + tl.arange(0, TOKENS)
    token_mask = tokens < stop
    outer = tl.program_id(0) * OUTER_BLOCK + tl.arange(0, OUTER_BLOCK)
    outer_mask = outer < width
    result = tl.zeros((TOKENS, OUTER_BLOCK), dtype=tl.float32)
    dtype: tl.constexpr = y.dtype.element_ty
    for _ in tl.static_range(LAYERS):
        rank = _load_rank(table, ALIGNED)
        if rank > 0:
            total = tl.zeros((TOKENS, OUTER_BLOCK), dtype=tl.float32)
            weight = (
                _matrix(table, 0, dtype, ALIGNED)
                if THROUGH_A
                else _matrix(table, 1, dtype, ALIGNED)
            )
            for begin in tl.static_range(0, RANK, RANK_BLOCK):
                ranks = begin + tl.arange(0, RANK_BLOCK)
                rank_mask = ranks < rank
                shrunk_address = shrunk + tokens[:, None] * RANK + ranks[None, :]
                shrunk_mask = token_mask[:, None] & rank_mask[None, :]
                values = tl.load(shrunk_address, mask=shrunk_mask, other=0.0)
                if THROUGH_A:
                    weight_offsets = ranks[:, None] * width + outer[None, :]
                else:
                    weight_offsets = outer[None, :] * rank + ranks[:, None]
                weight_mask = rank_mask[:, None] & outer_mask[None, :]
                weights = tl.load(weight + weight_offsets, mask=weight_mask, other=0.0)
                total = tl.dot(values, weights, total, input_precision="ieee")
            if not THROUGH_A:
                total *= _load_scaling(span, table)
            if DROPOUT:
                total = tl.where(_dropout_keeps(span, table, tokens - start, outer), total, 0.0)
            result += total
        table += 8
        shrunk += token_count.to(tl.int64) * RANK
    address = y + tokens[:, None] * width + outer[None, :]
    mask = token_mask[:, None] & outer_mask[None, :]
    tl.store(address, result.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["token_count"])  # or multiples of 16 would be compiled separately
def weight_gradient_kernel(
    x, shrunk, tables, spans, stride, width, token_count,
    OF_B: tl.constexpr, DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, RANK: tl.constexpr,
    TOKENS: tl.constexpr, RANK_BLOCK: tl.constexpr, OUTER_BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of A: shrunkᵀ x over a slot's tokens; OF_B: of B, scaling · xᵀ shrunk."""
    slot = tl.program_id(2)
    # Programs that read the same tokens are next to each other.
    layer = tl.program_id(0) // (RANK // RANK_BLOCK)
    span, table = spans + 4 * slot, tables + slot * stride + 8 * layer
    rank = _load_rank(table, ALIGNED)
    if rank == 0:
        return
    start, stop = tl.load(span), tl.load(span + 1)
    outer = tl.program_id(1) * OUTER_BLOCK + tl.arange(0, OUTER_BLOCK)
    outer_mask = outer < width
    ranks = tl.program_id(0) % (RANK // RANK_BLOCK) * RANK_BLOCK + tl.arange(0, RANK_BLOCK)
    shrunk += layer.to(tl.int64) * token_count * RANK
    total = tl.zeros((OUTER_BLOCK, RANK_BLOCK), dtype=tl.float32)
    for begin in range(start, stop, TOKENS):
        tokens = begin + tl.arange(0, TOKENS)
        token_mask = tokens < stop
        mask = token_mask[:, None] & outer_mask[None, :]
        values = tl.load(x + tokens[:, None] * width + outer[None, :], mask=mask, other=0.0)
        if DROPOUT:
            keeps = _dropout_keeps(span, table, tokens - start, outer)
            values = tl.where(keeps, values, tl.zeros_like(values))
        shrunk_address = shrunk + tokens[:, None] * RANK + ranks[None, :]
        low_rank = tl.load(shrunk_address, mask=token_mask[:, None], other=0.0)
        total = tl.dot(tl.trans(values), low_rank, total, input_precision="ieee")
    if OF_B:
        total *= _load_scaling(span, table)
        address = _matrix(table, 3, tl.float32, ALIGNED) + outer[:, None] * rank + ranks[None, :]
    else:
        address = _matrix(table, 2, tl.float32, ALIGNED) + ranks[None, :] * width + outer[:, None]
    tl.store(address, total, mask=outer_mask[:, None] & (ranks < rank)[None, :])
