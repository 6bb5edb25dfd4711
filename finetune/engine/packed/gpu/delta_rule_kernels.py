"""Triton kernels of the gated delta rule (Yang, Kautz and Hatamizadeh, 2025) over rows of a batch.

Each head has a state S [value columns, key columns]. A token with query q, key k, value v, decay a
and rate b changes it to a S + b (v - a S k) kᵀ and reads S q. Chunks of CHUNK tokens are computed
at once in the form of the paper's section 3.3, after flash-linear-attention: with G the running
sum of log a in a chunk, and E[i, j] = exp(G[i] - G[j]) for i ≥ j,

    A = strictly lower part of b · (k kᵀ) E,  T = (I + A)⁻¹ b,  scores = lower part of (q kᵀ) E,
    r = v - exp(G) (k Sᵀ),  n = T r,
    outputs = exp(G) (q Sᵀ) + scores n,
    next S = exp(G of the last token) S + nᵀ (exp(G of the last token - G) k).

Queries and keys get the length 1 first; queries are then scaled by 1 / √(key columns). Value
heads share key heads. Only S goes from chunk to chunk: programs that need it go over the chunks of
one row, all else is computed for every chunk at once. Tokens beyond a row's end have zeros
everywhere and change nothing.

The programs of a row keep S in registers, where a matrix product takes its left operand from, and
compute r, n and the outputs transposed [value columns, tokens]: each product then leaves the next
one's left operand where it is needed, without a way through shared memory.
"""

import triton
import triton.language as tl

from finetune.engine.packed.gpu.element_access import load_float32, store_rounded
from finetune.engine.packed.gpu.triangular_inverse import unit_lower_inverse


@triton.jit
def _multiply(a, b, DTYPE: tl.constexpr):
    """A matrix product of operands of the base's dtype, summed in float32."""
    return tl.dot(a.to(DTYPE), b.to(DTYPE), input_precision="ieee")


@triton.jit
def _cells(tokens, stride, first_column, COLUMNS: tl.constexpr):
    """Offsets of consecutive columns of some tokens [tokens, COLUMNS]."""
    columns = first_column + tl.arange(0, COLUMNS)
    return tokens.to(tl.int64)[:, None] * stride + columns[None, :]


@triton.jit
def _load_columns(tensor, tokens, stride, first_column, mask, COLUMNS: tl.constexpr):
    """Consecutive columns of some tokens [tokens, COLUMNS]; 0 where the mask is False."""
    offsets = _cells(tokens, stride, first_column, COLUMNS)
    return tl.load(tensor + offsets, mask=mask[:, None], other=0.0)


@triton.jit
def _store_columns(
    tensor, values, tokens, stride, first_column, mask, COLUMNS: tl.constexpr
):
    offsets = _cells(tokens, stride, first_column, COLUMNS)
    store_rounded(tensor, offsets, values, mask[:, None])


@triton.jit
def _normalize(values):
    """Rows with the length 1, and 1 / their lengths."""
    inverse = tl.rsqrt(tl.sum(values * values, 1) + 1e-6)
    return values * inverse[:, None], inverse


@triton.jit
def _normalize_backward(grads, normalized, inverse):
    """Gradient of the rows before `_normalize`."""
    along = tl.sum(grads * normalized, 1)
    return (grads - normalized * along[:, None]) * inverse[:, None]


@triton.jit
def _pairs(later, earlier):
    """E from sums that are later, and earlier ones; ones where they are not: no power overflows."""
    return tl.exp(tl.minimum(later - earlier, 0.0))


@triton.jit
def _store_unit_rows(
    units, qkv, tokens, qkv_stride, first_column, unit_stride, unit_column, scale, mask,
    COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Store and return some columns of tokens with the length `scale`, in the base's dtype."""
    rows = _load_columns(qkv, tokens, qkv_stride, first_column, mask, COLUMNS)
    normalized, _ = _normalize(rows.to(tl.float32))
    rounded = (normalized * scale).to(DTYPE)
    offsets = _cells(tokens, unit_stride, unit_column, COLUMNS)
    tl.store(units + offsets, rounded, mask=mask[:, None])
    return rounded


@triton.jit
def chunk_kernel(
    qkv, log_decays, rates, queries, keys, sums, inverses, scores, chunks, qkv_stride, heads,
    group_size, key_start, scale,
    CHUNK: tl.constexpr, KEYS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """What a chunk has without its state, for a key head and its value heads.

    Queries and keys of their final length [tokens, key heads, KEYS]; G [tokens, heads]; T and the
    scores [chunks, heads, CHUNK, CHUNK].
    """
    chunk = tl.program_id(0)
    key_head = tl.program_id(1)
    first = tl.load(chunks + 2 * chunk)
    stop = tl.load(chunks + 2 * chunk + 1)
    # The empty chunks of a padded table.
    if first >= stop:
        return
    row = tl.arange(0, CHUNK)
    tokens = first + row
    mask = tokens < stop
    column = key_head * KEYS
    unit_stride = heads // group_size * KEYS
    chunk_keys = _store_unit_rows(
        keys, qkv, tokens, qkv_stride, key_start + column, unit_stride, column, 1.0, mask,
        KEYS, DTYPE
    )  # fmt: skip
    chunk_queries = _store_unit_rows(
        queries, qkv, tokens, qkv_stride, column, unit_stride, column, scale, mask, KEYS, DTYPE
    )  # fmt: skip
    key_products = _multiply(chunk_keys, tl.trans(chunk_keys), DTYPE)
    query_products = _multiply(chunk_queries, tl.trans(chunk_keys), DTYPE)
    is_lower = row[:, None] >= row[None, :]
    is_strictly_lower = row[:, None] > row[None, :]
    square = row[:, None] * CHUNK + row[None, :]
    for number in range(0, group_size):
        head = key_head * group_size + number
        offsets = tokens * heads + head
        chunk_sums = tl.cumsum(load_float32(log_decays, offsets, mask), 0)
        chunk_rates = load_float32(rates, offsets, mask)
        tl.store(sums + offsets, chunk_sums, mask=mask)
        pairs = _pairs(chunk_sums[:, None], chunk_sums[None, :])
        system = tl.where(is_strictly_lower, key_products * pairs, 0.0)
        inverse = unit_lower_inverse(system * chunk_rates[:, None], CHUNK)
        cells = (chunk.to(tl.int64) * heads + head) * CHUNK * CHUNK + square
        store_rounded(inverses, cells, inverse * chunk_rates[None, :], True)
        chunk_scores = tl.where(is_lower, query_products * pairs, 0.0)
        store_rounded(scores, cells, chunk_scores, True)


@triton.jit
def _row_of(rows):
    """This program's row: its first token, one past its last, and its first chunk."""
    row = rows + 3 * tl.program_id(0)
    return tl.load(row), tl.load(row + 1), tl.load(row + 2).to(tl.int64)


@triton.jit
def _load_sums(sums, first, stop, heads, head, CHUNK: tl.constexpr):
    """G of a chunk, and its last; beyond the row's end it is the last too."""
    tokens = first + tl.arange(0, CHUNK)
    total = tl.load(sums + (tl.minimum(first + CHUNK, stop) - 1) * heads + head)
    chunk_sums = load_float32(sums, tokens * heads + head, tokens < stop)
    return tl.where(tokens < stop, chunk_sums, total), total


@triton.jit
def _state_cells(
    chunk_head,
    first_column,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Offsets of BLOCK rows of a state [BLOCK, KEYS]."""
    columns = first_column + tl.arange(0, BLOCK)
    keys = tl.arange(0, KEYS)
    return chunk_head * KEYS * VALUES + columns[:, None] * KEYS + keys[None, :]


@triton.jit
def delta_rule_kernel(
    qkv, queries, keys, sums, inverses, scores, output, states, corrections, rows, qkv_stride,
    heads, group_size, value_start,
    STORE_STATES: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Outputs [tokens, heads, VALUES], or for the backward pass S before each chunk and n.

    A program has BLOCK columns of the values: those of a state do not depend on each other.
    """
    start, stop, chunk = _row_of(rows)
    head = tl.program_id(1)
    first_value = tl.program_id(2) * BLOCK
    value_column = head * VALUES + first_value
    key_column = head // group_size * KEYS
    key_stride = heads // group_size * KEYS
    row = tl.arange(0, CHUNK)
    square = row[:, None] * CHUNK + row[None, :]
    state = tl.zeros((BLOCK, KEYS), tl.float32)
    for number in range(0, tl.cdiv(stop - start, CHUNK)):
        first = start + number * CHUNK
        tokens = first + row
        mask = tokens < stop
        chunk_head = (chunk + number) * heads + head
        chunk_keys = _load_columns(keys, tokens, key_stride, key_column, mask, KEYS)
        values = _load_columns(
            qkv, tokens, qkv_stride, value_start + value_column, mask, BLOCK
        )
        inverse = tl.load(inverses + chunk_head * CHUNK * CHUNK + square)
        chunk_sums, total = _load_sums(sums, first, stop, heads, head, CHUNK)
        growth = tl.exp(chunk_sums)[None, :]
        rounded_state = state.to(DTYPE)
        predicted = _multiply(rounded_state, tl.trans(chunk_keys), DTYPE) * growth
        errors = tl.trans(values).to(tl.float32) - predicted
        correction = _multiply(errors, tl.trans(inverse), DTYPE)
        if STORE_STATES:
            cells = _state_cells(chunk_head, first_value, KEYS, VALUES, BLOCK)
            tl.store(states + cells, rounded_state)
            _store_columns(
                corrections, tl.trans(correction), tokens, heads * VALUES, value_column, mask,
                BLOCK
            )  # fmt: skip
        else:
            chunk_queries = _load_columns(
                queries, tokens, key_stride, key_column, mask, KEYS
            )
            chunk_scores = tl.load(scores + chunk_head * CHUNK * CHUNK + square)
            result = _multiply(rounded_state, tl.trans(chunk_queries), DTYPE) * growth
            result += _multiply(correction, tl.trans(chunk_scores), DTYPE)
            _store_columns(
                output,
                tl.trans(result),
                tokens,
                heads * VALUES,
                value_column,
                mask,
                BLOCK,
            )
        remaining = tl.exp(total - chunk_sums)[None, :]
        state = tl.exp(total) * state
        state += _multiply(correction * remaining, chunk_keys, DTYPE)


@triton.jit
def grad_states_kernel(
    queries, keys, sums, inverses, scores, grad_output, grad_states, grad_value, rows,
    grad_value_stride, heads, group_size,
    CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradients of S after each chunk, and of r, which are those of the values.

    From the last chunk of a row to its first.
    """
    start, stop, chunk = _row_of(rows)
    head = tl.program_id(1)
    first_value = tl.program_id(2) * BLOCK
    value_column = head * VALUES + first_value
    key_column = head // group_size * KEYS
    key_stride = heads // group_size * KEYS
    row = tl.arange(0, CHUNK)
    square = row[:, None] * CHUNK + row[None, :]
    chunk_count = tl.cdiv(stop - start, CHUNK)
    grad_state = tl.zeros((BLOCK, KEYS), tl.float32)
    for back in range(0, chunk_count):
        number = chunk_count - 1 - back
        first = start + number * CHUNK
        tokens = first + row
        mask = tokens < stop
        chunk_head = (chunk + number) * heads + head
        grads = _load_columns(
            grad_output, tokens, heads * VALUES, value_column, mask, BLOCK
        )
        chunk_scores = tl.load(scores + chunk_head * CHUNK * CHUNK + square)
        chunk_keys = _load_columns(keys, tokens, key_stride, key_column, mask, KEYS)
        inverse = tl.load(inverses + chunk_head * CHUNK * CHUNK + square)
        chunk_queries = _load_columns(
            queries, tokens, key_stride, key_column, mask, KEYS
        )
        chunk_sums, total = _load_sums(sums, first, stop, heads, head, CHUNK)
        growth = tl.exp(chunk_sums)[None, :]
        remaining = tl.exp(total - chunk_sums)[None, :]
        rounded_state = grad_state.to(DTYPE)
        cells = _state_cells(chunk_head, first_value, KEYS, VALUES, BLOCK)
        tl.store(grad_states + cells, rounded_state)
        grad_correction = (
            _multiply(rounded_state, tl.trans(chunk_keys), DTYPE) * remaining
        )
        grad_correction += _multiply(tl.trans(grads), chunk_scores, DTYPE)
        grad_errors = _multiply(grad_correction, inverse, DTYPE)
        _store_columns(
            grad_value, tl.trans(grad_errors), tokens, grad_value_stride, value_column, mask,
            BLOCK
        )  # fmt: skip
        grad_state = tl.exp(total) * grad_state
        grown = tl.trans(grads).to(tl.float32) * growth
        grad_state += _multiply(grown, chunk_queries, DTYPE)
        grad_state -= _multiply(grad_errors * growth, chunk_keys, DTYPE)


@triton.jit
def delta_rule_backward_kernel(
    queries, keys, sums, rates, states, corrections, grad_output, grad_states, grad_value,
    head_queries, head_keys, grad_log_decays, grad_rates, chunks, grad_value_stride, heads,
    group_size,
    CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and keys for each value head, and of log decays and rates.

    A key has two roles: k Sᵀ and the rows of A read with it, nᵀ k and the columns of A and of the
    scores write with it. G grows with the first and shrinks with the second.
    """
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.load(chunks + 2 * chunk)
    stop = tl.load(chunks + 2 * chunk + 1)
    # Nothing has written the states of the empty chunks of a padded table.
    if first >= stop:
        return
    chunk_head = chunk.to(tl.int64) * heads + head
    key_column = head // group_size * KEYS
    key_stride = heads // group_size * KEYS
    stride = heads * VALUES
    row = tl.arange(0, CHUNK)
    tokens = first + row
    mask = tokens < stop
    # n = T r with T = (I + A)⁻¹ b: A's gradient is the negative product of that of r and n, and
    # that of a rate the sum of their elements, without b. Both products are computed transposed
    # too: transposing them in registers gave wrong results on Hopper before Triton 3.7.1
    # (flash-linear-attention#640).
    grad_scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    grad_system = tl.zeros((CHUNK, CHUNK), tl.float32)
    transposed_scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    transposed_system = tl.zeros((CHUNK, CHUNK), tl.float32)
    grad_rate = tl.zeros((CHUNK,), tl.float32)
    for block in tl.static_range(VALUES // BLOCK):
        column = head * VALUES + block * BLOCK
        correction = _load_columns(corrections, tokens, stride, column, mask, BLOCK)
        grads = _load_columns(grad_output, tokens, stride, column, mask, BLOCK)
        grad_errors = _load_columns(
            grad_value, tokens, grad_value_stride, column, mask, BLOCK
        )
        grad_scores += _multiply(grads, tl.trans(correction), DTYPE)
        grad_system -= _multiply(grad_errors, tl.trans(correction), DTYPE)
        transposed_scores += _multiply(correction, tl.trans(grads), DTYPE)
        transposed_system -= _multiply(correction, tl.trans(grad_errors), DTYPE)
        grad_rate += tl.sum(grad_errors.to(tl.float32) * correction.to(tl.float32), 1)
    offsets = tokens * heads + head
    chunk_rates = load_float32(rates, offsets, mask)
    # n and the gradient of r are products with b. A rate of 0 is a sigmoid without a slope.
    divisors = tl.where(chunk_rates > 0.0, chunk_rates, 1.0)
    tl.store(grad_rates + offsets, grad_rate / divisors / divisors, mask=mask)
    chunk_sums, total = _load_sums(sums, first, stop, heads, head, CHUNK)
    pairs = _pairs(chunk_sums[:, None], chunk_sums[None, :])
    transposed_pairs = _pairs(chunk_sums[None, :], chunk_sums[:, None])
    grad_scores = tl.where(row[:, None] >= row[None, :], grad_scores * pairs, 0.0)
    grad_system = tl.where(row[:, None] > row[None, :], grad_system * pairs, 0.0)
    transposed_scores = tl.where(
        row[:, None] <= row[None, :], transposed_scores * transposed_pairs, 0.0
    )
    transposed_system = tl.where(
        row[:, None] < row[None, :], transposed_system * transposed_pairs, 0.0
    )
    grad_scores, grad_system = grad_scores.to(DTYPE), grad_system.to(DTYPE)
    transposed_scores = transposed_scores.to(DTYPE)
    transposed_system = transposed_system.to(DTYPE)
    growth = tl.exp(chunk_sums)[:, None]
    chunk_keys = _load_columns(keys, tokens, key_stride, key_column, mask, KEYS)

    grad_queries = tl.zeros((CHUNK, KEYS), tl.float32)
    for block in tl.static_range(VALUES // BLOCK):
        column = head * VALUES + block * BLOCK
        grads = _load_columns(grad_output, tokens, stride, column, mask, BLOCK)
        cells = _state_cells(chunk_head, block * BLOCK, KEYS, VALUES, BLOCK)
        grad_queries += _multiply(grads, tl.load(states + cells), DTYPE)
    grad_queries = grad_queries * growth + _multiply(grad_scores, chunk_keys, DTYPE)
    chunk_queries = _load_columns(queries, tokens, key_stride, key_column, mask, KEYS)
    grad_sums = tl.sum(grad_queries * chunk_queries.to(tl.float32), 1)
    _store_columns(
        head_queries, grad_queries, tokens, heads * KEYS, head * KEYS, mask, KEYS
    )

    grad_keys = tl.zeros((CHUNK, KEYS), tl.float32)
    for block in tl.static_range(VALUES // BLOCK):
        column = head * VALUES + block * BLOCK
        grad_errors = _load_columns(
            grad_value, tokens, grad_value_stride, column, mask, BLOCK
        )
        cells = _state_cells(chunk_head, block * BLOCK, KEYS, VALUES, BLOCK)
        grad_keys -= _multiply(grad_errors, tl.load(states + cells), DTYPE)
    grad_keys = grad_keys * growth + _multiply(grad_system, chunk_keys, DTYPE)
    grad_sums += tl.sum(grad_keys * chunk_keys.to(tl.float32), 1)

    grad_written = tl.zeros((CHUNK, KEYS), tl.float32)
    grad_total = 0.0
    for block in tl.static_range(VALUES // BLOCK):
        column = head * VALUES + block * BLOCK
        correction = _load_columns(corrections, tokens, stride, column, mask, BLOCK)
        cells = _state_cells(chunk_head, block * BLOCK, KEYS, VALUES, BLOCK)
        grad_state = tl.load(grad_states + cells)
        grad_written += _multiply(correction, grad_state, DTYPE)
        products = tl.load(states + cells).to(tl.float32) * grad_state.to(tl.float32)
        grad_total += tl.sum(tl.sum(products, 1), 0)
    grad_written *= tl.exp(total - chunk_sums)[:, None]
    grad_total *= tl.exp(total)
    # The last G is in each of these factors.
    grad_total += tl.sum(tl.sum(grad_written * chunk_keys.to(tl.float32), 1), 0)
    grad_written += _multiply(transposed_scores, chunk_queries, DTYPE)
    grad_written += _multiply(transposed_system, chunk_keys, DTYPE)
    grad_sums -= tl.sum(grad_written * chunk_keys.to(tl.float32), 1)
    _store_columns(
        head_keys,
        grad_keys + grad_written,
        tokens,
        heads * KEYS,
        head * KEYS,
        mask,
        KEYS,
    )
    # Each log decay is in all later sums.
    later = tl.sum(grad_sums, 0) - tl.cumsum(grad_sums, 0) + grad_sums
    tl.store(grad_log_decays + offsets, later + grad_total, mask=mask)


@triton.jit
def shared_heads_kernel(
    qkv, head_queries, head_keys, grad_qkv, chunks, qkv_stride, gradient_stride, heads, group_size,
    key_start, scale,
    CHUNK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and keys before they got their length, summed over their value heads."""
    first = tl.load(chunks + 2 * tl.program_id(0))
    stop = tl.load(chunks + 2 * tl.program_id(0) + 1)
    tokens = first + tl.arange(0, CHUNK)
    mask = tokens < stop
    _sum_heads(
        qkv, head_queries, grad_qkv, tokens, qkv_stride, gradient_stride, 0, heads, group_size,
        scale, mask, KEYS
    )  # fmt: skip
    _sum_heads(
        qkv, head_keys, grad_qkv, tokens, qkv_stride, gradient_stride, key_start, heads,
        group_size, 1.0, mask, KEYS
    )  # fmt: skip


@triton.jit
def _sum_heads(
    qkv, head_gradients, gradient, tokens, qkv_stride, gradient_stride, start, heads, group_size,
    scale, mask, KEYS: tl.constexpr,
):  # fmt: skip
    """Of this program's key head, whose columns are behind `start`."""
    key_head = tl.program_id(1)
    column = start + key_head * KEYS
    rows = _load_columns(qkv, tokens, qkv_stride, column, mask, KEYS)
    normalized, inverse = _normalize(rows.to(tl.float32))
    total = tl.zeros_like(normalized)
    for number in range(0, group_size):
        head_column = (key_head * group_size + number) * KEYS
        head_gradient = _load_columns(
            head_gradients, tokens, heads * KEYS, head_column, mask, KEYS
        )
        total += head_gradient.to(tl.float32)
    grads = _normalize_backward(total * scale, normalized, inverse)
    _store_columns(gradient, grads, tokens, gradient_stride, column, mask, KEYS)
