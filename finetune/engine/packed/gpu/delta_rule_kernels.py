"""Triton kernels of the gated delta rule (Yang, Kautz and Hatamizadeh, 2025) over rows of a batch.

Each head has a state S [key columns, value columns]. A token with query q, key k, value v, decay a
and rate b changes it to a S + k (b (v - a Sᵀ k))ᵀ and reads Sᵀ q. Chunks of CHUNK tokens are
computed at once in the form of the paper's section 3.3, after flash-linear-attention: with G the
running sum of log a in a chunk, and E[i, j] = exp(G[i] - G[j]) for i ≥ j,

    A = strictly lower part of b · (k kᵀ) E,  T = (I + A)⁻¹,
    w = T (b exp(G) k),  u = T (b v),  n = u - w S,
    outputs = (exp(G) q) S + (lower part of (q kᵀ) E) n,
    next S = exp(G of the last token) S + (exp(G of the last token - G) k)ᵀ n.

Queries and keys get the length 1 first; queries are then scaled by 1 / √(key columns). Value
heads share key heads. Only S goes from chunk to chunk: programs that need it go over the chunks of
one row, all else is computed for every chunk at once. Tokens beyond a row's end have zeros
everywhere and change nothing.
"""

import triton
import triton.language as tl

from finetune.engine.packed.gpu.element_access import load_float32, store_rounded


@triton.jit
def _multiply(a, b, DTYPE: tl.constexpr):
    """A matrix product of operands of the base's dtype, summed in float32."""
    return tl.dot(a.to(DTYPE), b.to(DTYPE), input_precision="ieee")


@triton.jit
def _load_columns(tensor, tokens, stride, first_column, mask, COLUMNS: tl.constexpr):
    """Consecutive columns of some tokens, float32 [tokens, COLUMNS]."""
    columns = first_column + tl.arange(0, COLUMNS)
    offsets = tokens.to(tl.int64)[:, None] * stride + columns[None, :]
    return load_float32(tensor, offsets, mask[:, None])


@triton.jit
def _store_columns(
    tensor, values, tokens, stride, first_column, mask, COLUMNS: tl.constexpr
):
    columns = first_column + tl.arange(0, COLUMNS)
    offsets = tokens.to(tl.int64)[:, None] * stride + columns[None, :]
    store_rounded(
        tensor,
        offsets,
        values,
        mask[:, None],
    )


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
def _load_gates(log_decays, rates, tokens, heads, head, mask, CHUNK: tl.constexpr):
    """Running sums of the log decays G, the last of them, E, and the rates."""
    offsets = tokens * heads + head
    decays = load_float32(log_decays, offsets, mask)
    sums = tl.cumsum(decays, 0)
    total = tl.sum(decays, 0)
    row = tl.arange(0, CHUNK)
    is_lower = row[:, None] >= row[None, :]
    # Above the diagonal the power would overflow.
    differences = tl.where(is_lower, sums[:, None] - sums[None, :], 0.0)
    pairs = tl.where(is_lower, tl.exp(differences), 0.0)
    return sums, total, pairs, load_float32(rates, offsets, mask)


@triton.jit
def _lower_system(keys, pairs, rates, CHUNK: tl.constexpr, DTYPE: tl.constexpr):
    """A, and its factor (k kᵀ) E."""
    row = tl.arange(0, CHUNK)
    products = _multiply(keys, tl.trans(keys), DTYPE) * pairs
    products = tl.where(row[:, None] > row[None, :], products, 0.0)
    return products * rates[:, None], products


@triton.jit
def inverse_kernel(
    qkv, log_decays, rates, inverses, chunks, qkv_stride, heads, group_size, key_start,
    CHUNK: tl.constexpr, KEYS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """T of every chunk and head [chunks, heads, CHUNK, CHUNK]."""
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.load(chunks + 2 * chunk)
    stop = tl.load(chunks + 2 * chunk + 1)
    tokens = first + tl.arange(0, CHUNK)
    mask = tokens < stop
    key_column = key_start + head // group_size * KEYS
    keys = _load_columns(qkv, tokens, qkv_stride, key_column, mask, KEYS)
    keys, _ = _normalize(keys)
    _, _, pairs, chunk_rates = _load_gates(
        log_decays, rates, tokens, heads, head, mask, CHUNK
    )
    system, _ = _lower_system(keys, pairs, chunk_rates, CHUNK, DTYPE)
    row = tl.arange(0, CHUNK)
    # Forward substitution, row by row: a series of powers of A would lose all digits where keys
    # resemble each other.
    inverse = tl.where(row[:, None] == row[None, :], 1.0, 0.0)
    for number in range(1, CHUNK):
        factors = tl.sum(tl.where(row[:, None] == number, system, 0.0), 0)
        solved = tl.sum(factors[:, None] * inverse, 0)
        inverse = tl.where(row[:, None] == number, inverse - solved[None, :], inverse)
    place = (chunk.to(tl.int64) * heads + head) * CHUNK * CHUNK
    offsets = row[:, None] * CHUNK + row[None, :]
    tl.store(inverses + place + offsets, inverse)


@triton.jit
def _row_of(rows):
    """This program's row: its first token, one past its last, and its first chunk."""
    row = rows + 3 * tl.program_id(0)
    return tl.load(row), tl.load(row + 1), tl.load(row + 2).to(tl.int64)


@triton.jit
def delta_rule_kernel(
    qkv, log_decays, rates, inverses, output, states, corrections, rows, qkv_stride, heads,
    group_size, key_start, value_start, scale,
    STORE_STATES: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Outputs [tokens, heads, VALUES], or for the backward pass S before each chunk and n.

    A program has BLOCK columns of the values: those of a state do not depend on each other.
    """
    start, stop, chunk = _row_of(rows)
    head = tl.program_id(1)
    first_value = head * VALUES + tl.program_id(2) * BLOCK
    query_column = head // group_size * KEYS
    row = tl.arange(0, CHUNK)
    square = row[:, None] * CHUNK + row[None, :]
    state = tl.zeros((KEYS, BLOCK), tl.float32)
    for first in range(start, stop, CHUNK):
        tokens = first + row
        mask = tokens < stop
        keys = _load_columns(
            qkv, tokens, qkv_stride, key_start + query_column, mask, KEYS
        )
        keys, _ = _normalize(keys)
        values = _load_columns(
            qkv, tokens, qkv_stride, value_start + first_value, mask, BLOCK
        )
        sums, total, pairs, chunk_rates = _load_gates(
            log_decays, rates, tokens, heads, head, mask, CHUNK
        )
        place = chunk * heads + head
        inverse = tl.load(inverses + place * CHUNK * CHUNK + square)
        weights = _multiply(
            inverse, keys * (chunk_rates * tl.exp(sums))[:, None], DTYPE
        )
        updates = _multiply(inverse, values * chunk_rates[:, None], DTYPE)
        correction = updates - _multiply(weights, state, DTYPE)
        if STORE_STATES:
            _store_state(states, state, place, KEYS, VALUES, BLOCK)
            _store_columns(
                corrections, correction, tokens, heads * VALUES, first_value, mask, BLOCK
            )  # fmt: skip
        else:
            queries = _load_columns(qkv, tokens, qkv_stride, query_column, mask, KEYS)
            queries, _ = _normalize(queries)
            queries *= scale
            scores = _multiply(queries, tl.trans(keys), DTYPE) * pairs
            result = _multiply(queries * tl.exp(sums)[:, None], state, DTYPE)
            result += _multiply(scores, correction, DTYPE)
            _store_columns(
                output, result, tokens, heads * VALUES, first_value, mask, BLOCK
            )
        decayed = keys * tl.exp(total - sums)[:, None]
        state = tl.exp(total) * state + _multiply(tl.trans(decayed), correction, DTYPE)
        chunk += 1


@triton.jit
def _state_cells(
    first_column, KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr
):
    """Offsets of BLOCK columns of a state [KEYS, BLOCK]."""
    columns = first_column + tl.arange(0, BLOCK)
    return tl.arange(0, KEYS)[:, None] * VALUES + columns[None, :]


@triton.jit
def _store_state(
    states, state, place, KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr
):
    """Store this program's columns of a state."""
    cells = _state_cells(tl.program_id(2) * BLOCK, KEYS, VALUES, BLOCK)
    store_rounded(
        states + place * KEYS * VALUES,
        cells,
        state,
        True,
    )


@triton.jit
def grad_states_kernel(
    qkv, log_decays, rates, inverses, grad_output, grad_states, grad_corrections, rows,
    qkv_stride, heads, group_size, key_start, scale,
    CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradients of S after each chunk, and of n; from the last chunk of a row to its first."""
    start, stop, chunk = _row_of(rows)
    head = tl.program_id(1)
    first_value = head * VALUES + tl.program_id(2) * BLOCK
    query_column = head // group_size * KEYS
    row = tl.arange(0, CHUNK)
    square = row[:, None] * CHUNK + row[None, :]
    chunk_count = tl.cdiv(stop - start, CHUNK)
    grad_state = tl.zeros((KEYS, BLOCK), tl.float32)
    for back in range(0, chunk_count):
        number = chunk_count - 1 - back
        tokens = start + number * CHUNK + row
        mask = tokens < stop
        place = (chunk + number) * heads + head
        keys = _load_columns(
            qkv, tokens, qkv_stride, key_start + query_column, mask, KEYS
        )
        keys, _ = _normalize(keys)
        queries = _load_columns(qkv, tokens, qkv_stride, query_column, mask, KEYS)
        queries, _ = _normalize(queries)
        queries *= scale
        sums, total, pairs, chunk_rates = _load_gates(
            log_decays, rates, tokens, heads, head, mask, CHUNK
        )
        growth = tl.exp(sums)
        grads = _load_columns(
            grad_output, tokens, heads * VALUES, first_value, mask, BLOCK
        )
        _store_state(grad_states, grad_state, place, KEYS, VALUES, BLOCK)
        scores = _multiply(queries, tl.trans(keys), DTYPE) * pairs
        decayed = keys * tl.exp(total - sums)[:, None]
        grad_correction = _multiply(tl.trans(scores), grads, DTYPE)
        grad_correction += _multiply(decayed, grad_state, DTYPE)
        _store_columns(
            grad_corrections, grad_correction, tokens, heads * VALUES, first_value, mask, BLOCK
        )  # fmt: skip
        inverse = tl.load(inverses + place * CHUNK * CHUNK + square)
        weights = _multiply(inverse, keys * (chunk_rates * growth)[:, None], DTYPE)
        grad_state = tl.exp(total) * grad_state
        grad_state += _multiply(tl.trans(queries * growth[:, None]), grads, DTYPE)
        grad_state -= _multiply(tl.trans(weights), grad_correction, DTYPE)


@triton.jit
def delta_rule_backward_kernel(
    qkv, log_decays, rates, inverses, states, corrections, grad_output, grad_states,
    grad_corrections, grad_query, grad_key, grad_value, grad_log_decays, grad_rates, chunks,
    qkv_stride, grad_value_stride, heads, group_size, key_start, value_start, scale,
    CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and keys for each value head, of values, log decays and rates."""
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.load(chunks + 2 * chunk)
    stop = tl.load(chunks + 2 * chunk + 1)
    # Nothing has written the states of the empty chunks of a padded table.
    if first >= stop:
        return
    place = chunk.to(tl.int64) * heads + head
    query_column = head // group_size * KEYS
    row = tl.arange(0, CHUNK)
    is_lower = row[:, None] >= row[None, :]
    is_strictly_lower = row[:, None] > row[None, :]
    tokens = first + row
    mask = tokens < stop
    sums, total, pairs, chunk_rates = _load_gates(
        log_decays, rates, tokens, heads, head, mask, CHUNK
    )
    growth = tl.exp(sums)
    square = row[:, None] * CHUNK + row[None, :]
    inverse = tl.load(inverses + place * CHUNK * CHUNK + square)
    transposed = tl.trans(inverse)
    # What is summed over the columns of the values.
    grad_decayed = tl.zeros((CHUNK, KEYS), tl.float32)
    grad_grown = tl.zeros((CHUNK, KEYS), tl.float32)
    grad_weights = tl.zeros((CHUNK, KEYS), tl.float32)
    grad_scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    grad_inverse = tl.zeros((CHUNK, CHUNK), tl.float32)
    grad_rate = tl.zeros((CHUNK,), tl.float32)
    grad_total = 0.0
    for block in tl.static_range(VALUES // BLOCK):
        first_value = head * VALUES + block * BLOCK
        cells = place * KEYS * VALUES + _state_cells(block * BLOCK, KEYS, VALUES, BLOCK)
        state = tl.load(states + cells)
        grad_state = tl.load(grad_states + cells)
        correction = _load_columns(
            corrections, tokens, heads * VALUES, first_value, mask, BLOCK
        )
        grad_correction = _load_columns(
            grad_corrections, tokens, heads * VALUES, first_value, mask, BLOCK
        )
        grads = _load_columns(
            grad_output, tokens, heads * VALUES, first_value, mask, BLOCK
        )
        values = _load_columns(
            qkv, tokens, qkv_stride, value_start + first_value, mask, BLOCK
        )
        products = state.to(tl.float32) * grad_state.to(tl.float32)
        grad_total += tl.sum(tl.sum(products, 1), 0)
        grad_decayed += _multiply(correction, tl.trans(grad_state), DTYPE)
        grad_grown += _multiply(grads, tl.trans(state), DTYPE)
        grad_weights -= _multiply(grad_correction, tl.trans(state), DTYPE)
        grad_scores += _multiply(grads, tl.trans(correction), DTYPE)
        rated = values * chunk_rates[:, None]
        grad_inverse += _multiply(grad_correction, tl.trans(rated), DTYPE)
        grad_rated = _multiply(transposed, grad_correction, DTYPE)
        grad_rate += tl.sum(grad_rated * values, 1)
        _store_columns(
            grad_value, grad_rated * chunk_rates[:, None], tokens, grad_value_stride,
            first_value, mask, BLOCK
        )  # fmt: skip
    grad_total *= tl.exp(total)
    keys = _load_columns(qkv, tokens, qkv_stride, key_start + query_column, mask, KEYS)
    keys, inverse_key = _normalize(keys)
    # n = u - w S, and T = (I + A)⁻¹.
    factors = (chunk_rates * growth)[:, None]
    grad_inverse += _multiply(grad_weights, tl.trans(keys * factors), DTYPE)
    grad_rated = _multiply(transposed, grad_weights, DTYPE)
    along_keys = tl.sum(grad_rated * keys, 1) * growth
    grad_rate += along_keys
    grad_sums = along_keys * chunk_rates
    grad_keys = grad_rated * factors
    grad_system = -_multiply(
        transposed, _multiply(grad_inverse, transposed, DTYPE), DTYPE
    )
    grad_system = tl.where(is_strictly_lower, grad_system, 0.0)
    system, products = _lower_system(keys, pairs, chunk_rates, CHUNK, DTYPE)
    grad_rate += tl.sum(grad_system * products, 1)
    grad_pairs = grad_system * system
    grad_products = grad_system * chunk_rates[:, None] * pairs
    grad_keys += _multiply(grad_products + tl.trans(grad_products), keys, DTYPE)
    # The decayed keys.
    remaining = tl.exp(total - sums)
    grad_keys += grad_decayed * remaining[:, None]
    grad_remaining = tl.sum(grad_decayed * keys, 1) * remaining
    grad_sums -= grad_remaining
    grad_total += tl.sum(grad_remaining, 0)
    # The outputs.
    queries = _load_columns(qkv, tokens, qkv_stride, query_column, mask, KEYS)
    queries, inverse_query = _normalize(queries)
    scores = _multiply(queries * scale, tl.trans(keys), DTYPE) * pairs
    grad_scores = tl.where(is_lower, grad_scores, 0.0)
    grad_pairs += grad_scores * scores
    grad_products = grad_scores * pairs
    grad_queries = grad_grown * growth[:, None]
    grad_queries += _multiply(grad_products, keys, DTYPE)
    grad_sums += tl.sum(grad_grown * queries, 1) * growth * scale
    grad_keys += _multiply(tl.trans(grad_products), queries * scale, DTYPE)
    _store_columns(
        grad_query, _normalize_backward(grad_queries * scale, queries, inverse_query), tokens,
        heads * KEYS, head * KEYS, mask, KEYS
    )  # fmt: skip
    _store_columns(
        grad_key, _normalize_backward(grad_keys, keys, inverse_key), tokens, heads * KEYS,
        head * KEYS, mask, KEYS
    )  # fmt: skip
    # G: exp(G[i] - G[j]) in `pairs`; and each log decay is in all later sums.
    grad_sums += tl.sum(grad_pairs, 1) - tl.sum(grad_pairs, 0)
    later = tl.sum(grad_sums, 0) - tl.cumsum(grad_sums, 0) + grad_sums
    offsets = tokens * heads + head
    tl.store(grad_log_decays + offsets, later + grad_total, mask=mask)
    tl.store(grad_rates + offsets, grad_rate, mask=mask)
