"""Triton kernels of `lowrank`: products with each slot's A and B on that slot's tokens.

Every kernel finds a slot's matrices by its table (`adapter_tables.COLUMNS`), so slots may have
different ranks. `aligned` tables let the compiler use vector loads. Products get
`input_precision="ieee"`: Triton would otherwise round float32 operands to TF32.
"""

import triton
import triton.language as tl

from finetune.engine.packed.gpu.element_access import load_float32, store_rounded


@triton.jit
def _hash(x):
    """Mix 32 bits (lowbias32: Wellons, 2018)."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _dropout_keeps(
    span,
    table,
    tokens,
    columns,
):
    """Which elements dropout keeps [tokens, columns].

    Depends on the slot's key for this batch, the adapter, the token within the slot and the column.
    """
    key = tl.load(span + 2)
    threshold = tl.load(span + 3).to(tl.uint32)
    number = tl.load(table + 5)
    low = (key & 0xFFFFFFFF).to(tl.uint32)
    high = (key >> 32).to(tl.uint32)
    seed = _hash(low ^ _hash(high + number.to(tl.uint32)))
    row = _hash(tokens.to(tl.uint32) + seed)
    column = _hash(columns.to(tl.uint32))
    # High bits of a product of two random odd numbers: a better hash for each element would be
    # most of the cost of dropout.
    uniform = (column | 1)[None, :] * (row | 1)[:, None]
    return uniform >= threshold


@triton.jit
def _drop(
    values,
    span,
    table,
    tokens,
    columns,
):
    """Set what dropout drops to 0 [tokens, columns]; `_load_scaling` scales up the rest."""
    keeps = _dropout_keeps(span, table, tokens, columns)
    return tl.where(keeps, values, tl.zeros_like(values))


@triton.jit
def _matrix(
    table,
    column: tl.constexpr,
    dtype: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The address in a column of the table, as a pointer."""
    address = tl.load(table + column).to(tl.pointer_type(dtype))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def _matrix_a(table, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """A [rank, in_features]."""
    return _matrix(table, 0, dtype, ALIGNED)


@triton.jit
def _matrix_b(table, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """B [out_features, rank]."""
    return _matrix(table, 1, dtype, ALIGNED)


@triton.jit
def _gradient_a(table, ALIGNED: tl.constexpr):
    """The gradient of A [rank, in_features], always float32."""
    return _matrix(table, 2, tl.float32, ALIGNED)


@triton.jit
def _gradient_b(table, ALIGNED: tl.constexpr):
    """The gradient of B [out_features, rank], always float32."""
    return _matrix(table, 3, tl.float32, ALIGNED)


@triton.jit
def _load_rank(table, ALIGNED: tl.constexpr):
    rank = tl.load(table + 4).to(tl.int32)
    if ALIGNED:
        rank = tl.multiple_of(rank, 8)
    return rank


@triton.jit
def _load_scaling(span, table):
    """The adapter's scaling, divided by the share of elements that dropout keeps."""
    scaling_bits = tl.load(table + 6)
    scaling = scaling_bits.to(tl.float64, bitcast=True).to(tl.float32)
    # In units of 2**-32.
    dropout = tl.load(span + 3) / 4294967296
    return scaling / (1 - dropout)


@triton.jit
def load_tile(
    tiles,
    spans,
    tables,
    stride,
    number,
):
    """A tile's first token, and the rows of its slot in both tables."""
    tile = tiles + 2 * number
    slot = tl.load(tile)
    first_token = tl.load(tile + 1)
    return first_token, spans + 4 * slot, tables + slot * stride


@triton.jit
def _load_elements(
    x,
    tokens,
    columns,
    width,
    token_mask,
    column_mask,
):
    """Elements of x [tokens, width]; 0 where a mask is False."""
    offsets = tokens[:, None] * width + columns[None, :]
    mask = token_mask[:, None] & column_mask[None, :]
    return tl.load(x + offsets, mask=mask, other=0.0)


@triton.jit
def _shrink_tile(
    x, width, weight, rank, ranks, tokens, token_mask, start, span, table,
    THROUGH_B: tl.constexpr, DROPOUT: tl.constexpr, TOKENS: tl.constexpr,
    RANK_BLOCK: tl.constexpr, INNER_BLOCK: tl.constexpr,
):  # fmt: skip
    """x Aᵀ for a tile of tokens, THROUGH_B: x B [TOKENS, RANK_BLOCK], float32."""
    total = tl.zeros((TOKENS, RANK_BLOCK), dtype=tl.float32)
    for begin in range(0, width, INNER_BLOCK):
        inner = begin + tl.arange(0, INNER_BLOCK)
        inner_mask = inner < width
        values = _load_elements(x, tokens, inner, width, token_mask, inner_mask)
        if DROPOUT:
            values = _drop(
                values,
                span,
                table,
                tokens - start,
                inner,
            )
        if THROUGH_B:
            weight_offsets = inner[:, None] * rank + ranks[None, :]
        else:
            weight_offsets = ranks[None, :] * width + inner[:, None]
        weight_mask = inner_mask[:, None] & (ranks < rank)[None, :]
        weights = tl.load(weight + weight_offsets, mask=weight_mask, other=0.0)
        total = tl.dot(
            values,
            weights,
            total,
            input_precision="ieee",
        )
    return total


# Not specialised: numbers of tokens that are multiples of 16 would be compiled separately.
@triton.jit(do_not_specialize=["token_count"])
def shrink_kernel(
    x, shrunk, tables, spans, tiles, stride, width, token_count,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, RANK: tl.constexpr, TOKENS: tl.constexpr,
    RANK_BLOCK: tl.constexpr, INNER_BLOCK: tl.constexpr,
):  # fmt: skip
    """shrunk = x Aᵀ of one layer for a tile of tokens."""
    first, span, table = load_tile(tiles, spans, tables, stride, tl.program_id(1))
    # Programs that read the same tokens are next to each other, so that a cache may hold them.
    rank_blocks: tl.constexpr = RANK // RANK_BLOCK
    layer = tl.program_id(0) // rank_blocks
    first_rank = tl.program_id(0) % rank_blocks * RANK_BLOCK
    table += 8 * layer
    # The slot may have no adapter on this layer.
    rank = _load_rank(table, ALIGNED)
    if rank == 0:
        return
    start = tl.load(span)
    stop = tl.load(span + 1)
    # 64 bits: tokens times width may be too large for 32.
    tokens = first.to(tl.int64) + tl.arange(0, TOKENS)
    token_mask = tokens < stop
    ranks = first_rank + tl.arange(0, RANK_BLOCK)
    weight = _matrix_a(table, x.dtype.element_ty, ALIGNED)
    total = _shrink_tile(
        x, width, weight, rank, ranks, tokens, token_mask, start, span, table,
        False, DROPOUT, TOKENS, RANK_BLOCK, INNER_BLOCK
    )  # fmt: skip
    rows = layer.to(tl.int64) * token_count + tokens[:, None]
    store_rounded(
        shrunk,
        rows * RANK + ranks[None, :],
        total,
        token_mask[:, None],
    )


@triton.jit
def load_adapter(
    span, table,
    dtype: tl.constexpr, THROUGH_A: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """What `contribution` reads of a slot's adapter: A or B, its rank and its factor."""
    rank = _load_rank(table, ALIGNED)
    if THROUGH_A:
        weight = _matrix_a(table, dtype, ALIGNED)
        # A gradient that goes through A has the scaling from its way through B.
        factor = 1.0
    else:
        weight = _matrix_b(table, dtype, ALIGNED)
        factor = _load_scaling(span, table)
    return weight, rank, factor


@triton.jit
def contribution(
    shrunk, weight, rank, factor, span, table, tokens, outer, width, token_mask, outer_mask,
    THROUGH_A: tl.constexpr, DROPOUT: tl.constexpr, RANK: tl.constexpr, TOKENS: tl.constexpr,
    RANK_BLOCK: tl.constexpr, OUTER_BLOCK: tl.constexpr,
):  # fmt: skip
    """scaling · shrunk Bᵀ of one layer for a tile of tokens; THROUGH_A: shrunk A.

    [TOKENS, OUTER_BLOCK], float32; zero where the slot has no adapter on the layer.
    """
    # Without an adapter the rank is 0, and all that is loaded below is masked. There is no branch,
    # as Triton does not load ahead in loops that have one.
    total = tl.zeros((TOKENS, OUTER_BLOCK), dtype=tl.float32)
    for begin in tl.static_range(0, RANK, RANK_BLOCK):
        ranks = begin + tl.arange(0, RANK_BLOCK)
        rank_mask = ranks < rank
        values = _load_elements(shrunk, tokens, ranks, RANK, token_mask, rank_mask)
        if THROUGH_A:
            weight_offsets = ranks[:, None] * width + outer[None, :]
        else:
            weight_offsets = outer[None, :] * rank + ranks[:, None]
        weight_mask = rank_mask[:, None] & outer_mask[None, :]
        weights = tl.load(weight + weight_offsets, mask=weight_mask, other=0.0)
        total = tl.dot(
            values,
            weights,
            total,
            input_precision="ieee",
        )
    total *= factor
    if DROPOUT:
        total = _drop(
            total,
            span,
            table,
            tokens - tl.load(span),
            outer,
        )
    return total


# Not specialised: numbers of tokens that are multiples of 16 would be compiled separately.
@triton.jit(do_not_specialize=["token_count"])
def expand_kernel(
    y, residual, shrunk, tables, spans, tiles, stride, width, token_count,
    THROUGH_A: tl.constexpr, ADDS: tl.constexpr, DROPOUT: tl.constexpr, ALIGNED: tl.constexpr,
    LAYERS: tl.constexpr, RANK: tl.constexpr, TOKENS: tl.constexpr, RANK_BLOCK: tl.constexpr,
    OUTER_BLOCK: tl.constexpr,
):  # fmt: skip
    """y = scaling · shrunk Bᵀ for a tile of tokens; THROUGH_A: the sum of shrunk A over layers.

    ADDS: that and y are added to the residual instead.
    """
    first, span, table = load_tile(tiles, spans, tables, stride, tl.program_id(1))
    stop = tl.load(span + 1)
    tokens = first.to(tl.int64) + tl.arange(0, TOKENS)
    token_mask = tokens < stop
    outer = tl.program_id(0) * OUTER_BLOCK + tl.arange(0, OUTER_BLOCK)
    outer_mask = outer < width
    offsets = tokens[:, None] * width + outer[None, :]
    mask = token_mask[:, None] & outer_mask[None, :]
    result = tl.zeros((TOKENS, OUTER_BLOCK), dtype=tl.float32)
    # Several layers only through A: the gradients of their common input are summed here.
    for _ in tl.static_range(LAYERS):
        weight, rank, factor = load_adapter(
            span, table, y.dtype.element_ty, THROUGH_A, ALIGNED
        )
        result += contribution(
            shrunk, weight, rank, factor, span, table, tokens, outer, width, token_mask,
            outer_mask, THROUGH_A, DROPOUT, RANK, TOKENS, RANK_BLOCK, OUTER_BLOCK
        )  # fmt: skip
        table += 8
        shrunk += token_count.to(tl.int64) * RANK
    if ADDS:
        result += load_float32(y, offsets, mask)
        result += load_float32(residual, offsets, mask)
        store_rounded(residual, offsets, result, mask)
    else:
        store_rounded(y, offsets, result, mask)


@triton.jit
def _weight_gradient(
    x, width, shrunk, outer, outer_mask, ranks, start, stop, span, table,
    DROPOUT: tl.constexpr, RANK: tl.constexpr, TOKENS: tl.constexpr, RANK_BLOCK: tl.constexpr,
    OUTER_BLOCK: tl.constexpr,
):  # fmt: skip
    """xᵀ shrunk over a slot's tokens [OUTER_BLOCK, RANK_BLOCK], float32."""
    total = tl.zeros((OUTER_BLOCK, RANK_BLOCK), dtype=tl.float32)
    for begin in range(start, stop, TOKENS):
        tokens = begin + tl.arange(0, TOKENS)
        token_mask = tokens < stop
        values = _load_elements(x, tokens, outer, width, token_mask, outer_mask)
        if DROPOUT:
            values = _drop(
                values,
                span,
                table,
                tokens - start,
                outer,
            )
        shrunk_offsets = tokens[:, None] * RANK + ranks[None, :]
        low_rank = tl.load(shrunk + shrunk_offsets, mask=token_mask[:, None], other=0.0)
        total = tl.dot(
            tl.trans(values),
            low_rank,
            total,
            input_precision="ieee",
        )
    return total


# Not specialised: numbers of tokens that are multiples of 16 would be compiled separately.
@triton.jit(do_not_specialize=["token_count"])
def gradient_a_kernel(
    x, grad_shrunk, tables, spans, stride, width, token_count,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, RANK: tl.constexpr, TOKENS: tl.constexpr,
    RANK_BLOCK: tl.constexpr, OUTER_BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of A of one layer: grad_shrunkᵀ x over a slot's tokens."""
    slot = tl.program_id(2)
    # Programs that read the same tokens are next to each other, so that a cache may hold them.
    rank_blocks: tl.constexpr = RANK // RANK_BLOCK
    layer = tl.program_id(0) // rank_blocks
    first_rank = tl.program_id(0) % rank_blocks * RANK_BLOCK
    span = spans + 4 * slot
    table = tables + slot * stride + 8 * layer
    rank = _load_rank(table, ALIGNED)
    if rank == 0:
        return
    outer = tl.program_id(1) * OUTER_BLOCK + tl.arange(0, OUTER_BLOCK)
    outer_mask = outer < width
    ranks = first_rank + tl.arange(0, RANK_BLOCK)
    grad_shrunk += layer.to(tl.int64) * token_count * RANK
    total = _weight_gradient(
        x, width, grad_shrunk, outer, outer_mask, ranks, tl.load(span), tl.load(span + 1),
        span, table, DROPOUT, RANK, TOKENS, RANK_BLOCK, OUTER_BLOCK
    )  # fmt: skip
    # The scaling is in `grad_shrunk` already, which came through B.
    gradient_offsets = ranks[None, :] * width + outer[:, None]
    mask = outer_mask[:, None] & (ranks < rank)[None, :]
    tl.store(_gradient_a(table, ALIGNED) + gradient_offsets, total, mask=mask)


@triton.jit
def _of_layer(layer, first, second, third, fourth):
    """One of four values."""
    value = first
    if layer == 1:
        value = second
    if layer == 2:
        value = third
    if layer == 3:
        value = fourth
    return value


# Not specialised: numbers of tokens that are multiples of 16 would be compiled separately.
@triton.jit(do_not_specialize=["token_count", "tile_count", "outer_blocks"])
def expand_backward_kernel(
    grad_0, grad_1, grad_2, grad_3, shrunk, grad_shrunk, tables, spans, tiles, stride,
    width_0, width_1, width_2, width_3, token_count, tile_count, outer_blocks,
    LAYERS: tl.constexpr, ALIGNED: tl.constexpr, RANK: tl.constexpr, TILE_TOKENS: tl.constexpr,
    TILE_RANK_BLOCK: tl.constexpr, INNER_BLOCK: tl.constexpr, TOKENS: tl.constexpr,
    RANK_BLOCK: tl.constexpr, OUTER_BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of `expand_kernel` for layers with the same input: of `shrunk` and of B.

    Some programs compute grad_shrunk = scaling · grad B for a tile of tokens, others scaling ·
    gradᵀ shrunk for a block of a slot's B. Both read all of `grad`: they alternate, in the order of
    the slots, so that what one has read is still in the cache for the other.
    """
    dtype: tl.constexpr = grad_0.dtype.element_ty
    tile_rank_blocks: tl.constexpr = RANK // TILE_RANK_BLOCK
    tile_programs = tile_count * LAYERS * tile_rank_blocks
    program = tl.program_id(0)
    # 64 bits: the product of the numbers may be too large for 32.
    earlier = program.to(tl.int64) * tile_programs
    number = (earlier // tl.num_programs(0)).to(tl.int32)
    following = ((earlier + tile_programs) // tl.num_programs(0)).to(tl.int32)
    if following > number:
        layer = number // tile_rank_blocks % LAYERS
        first, span, table = load_tile(
            tiles, spans, tables, stride, number // (LAYERS * tile_rank_blocks)
        )
        table += 8 * layer
        rank = _load_rank(table, ALIGNED)
        if rank > 0:
            grad = _of_layer(layer, grad_0, grad_1, grad_2, grad_3)
            width = _of_layer(layer, width_0, width_1, width_2, width_3)
            tokens = first.to(tl.int64) + tl.arange(0, TILE_TOKENS)
            token_mask = tokens < tl.load(span + 1)
            first_rank = number % tile_rank_blocks * TILE_RANK_BLOCK
            tile_ranks = first_rank + tl.arange(0, TILE_RANK_BLOCK)
            total = _shrink_tile(
                grad, width, _matrix_b(table, dtype, ALIGNED), rank, tile_ranks, tokens,
                token_mask, 0, span, table, True, False, TILE_TOKENS, TILE_RANK_BLOCK,
                INNER_BLOCK
            )  # fmt: skip
            total *= _load_scaling(span, table)
            rows = layer.to(tl.int64) * token_count + tokens[:, None]
            offsets = rows * RANK + tile_ranks[None, :]
            store_rounded(grad_shrunk, offsets, total, token_mask[:, None])
    else:
        # Of the programs before this one, `number` are those of tiles.
        block = program - number
        rank_blocks: tl.constexpr = RANK // RANK_BLOCK
        first_rank = block % rank_blocks * RANK_BLOCK
        block = block // rank_blocks
        layer = block // outer_blocks % LAYERS
        slot = block // (outer_blocks * LAYERS)
        span = spans + 4 * slot
        table = tables + slot * stride + 8 * layer
        rank = _load_rank(table, ALIGNED)
        width = _of_layer(layer, width_0, width_1, width_2, width_3)
        # The blocks of the widest layer are more than others have.
        if (rank > 0) & (block % outer_blocks * OUTER_BLOCK < width):
            grad = _of_layer(layer, grad_0, grad_1, grad_2, grad_3)
            outer = block % outer_blocks * OUTER_BLOCK + tl.arange(0, OUTER_BLOCK)
            outer_mask = outer < width
            ranks = first_rank + tl.arange(0, RANK_BLOCK)
            start = tl.load(span)
            stop = tl.load(span + 1)
            total = _weight_gradient(
                grad, width, shrunk + layer.to(tl.int64) * token_count * RANK, outer, outer_mask,
                ranks, start, stop, span, table, False, RANK, TOKENS, RANK_BLOCK, OUTER_BLOCK
            )  # fmt: skip
            total *= _load_scaling(span, table)
            gradient_offsets = outer[:, None] * rank + ranks[None, :]
            mask = outer_mask[:, None] & (ranks < rank)[None, :]
            tl.store(_gradient_b(table, ALIGNED) + gradient_offsets, total, mask=mask)
