"""Triton kernels of the gated delta rule (Yang, Kautz and Hatamizadeh, 2025) over rows of a batch.

Each head has a state S [key columns, value columns]. A token with query q, key k, value v, decay a
and rate b changes it to a S + k (b (v - a Sᵀ k))ᵀ and reads Sᵀ q. Chunks of CHUNK tokens are
computed at once in the form of the paper's section 3.3, after flash-linear-attention: with G the
running sum of log a in a chunk, and E[i, j] = exp(G[i] - G[j]) for i ≥ j,

    A = strictly lower part of b · (k kᵀ) E,  T = (I + A)⁻¹,
    w = T (b exp(G) k),  u = T (b v),  n = u - w S,
    outputs = (exp(G) q) S + (lower part of (q kᵀ) E) n,
    next S = exp(G of the last token) S + (exp(G of the last token - G) k)ᵀ n.

Queries and keys get the length 1 first; queries are then scaled by 1 / √(key columns). A program
goes over the chunks of one row and one value head; value heads share key heads. Tokens beyond a
row's end have zeros everywhere and change nothing.
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
def delta_rule_kernel(
    qkv, log_decays, rates, inverses, output, states, corrections, rows, qkv_stride, heads,
    group_size, key_start, value_start, scale,
    STORE_STATES: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Outputs [tokens, heads, VALUES], or for the backward pass S before each chunk and n."""
    row_number = tl.program_id(0)
    head = tl.program_id(1)
    start = tl.load(rows + 3 * row_number)
    stop = tl.load(rows + 3 * row_number + 1)
    chunk = tl.load(rows + 3 * row_number + 2).to(tl.int64)
    query_column = head // group_size * KEYS
    value_column = value_start + head * VALUES
    row = tl.arange(0, CHUNK)
    square = row[:, None] * CHUNK + row[None, :]
    cells = tl.arange(0, KEYS)[:, None] * VALUES + tl.arange(0, VALUES)[None, :]
    state = tl.zeros((KEYS, VALUES), tl.float32)
    for first in range(start, stop, CHUNK):
        tokens = first + row
        mask = tokens < stop
        keys = _load_columns(
            qkv, tokens, qkv_stride, key_start + query_column, mask, KEYS
        )
        keys, _ = _normalize(keys)
        values = _load_columns(qkv, tokens, qkv_stride, value_column, mask, VALUES)
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
            store_rounded(
                states + place * KEYS * VALUES,
                cells,
                state,
                True,
            )
            _store_columns(
                corrections,
                correction,
                tokens,
                heads * VALUES,
                head * VALUES,
                mask,
                VALUES,
            )
        else:
            queries = _load_columns(qkv, tokens, qkv_stride, query_column, mask, KEYS)
            queries, _ = _normalize(queries)
            queries *= scale
            scores = _multiply(queries, tl.trans(keys), DTYPE) * pairs
            result = _multiply(queries * tl.exp(sums)[:, None], state, DTYPE)
            result += _multiply(scores, correction, DTYPE)
            _store_columns(
                output, result, tokens, heads * VALUES, head * VALUES, mask, VALUES
            )
        decayed = keys * tl.exp(total - sums)[:, None]
        state = tl.exp(total) * state + _multiply(tl.trans(decayed), correction, DTYPE)
        chunk += 1


@triton.jit
def delta_rule_backward_kernel(
    qkv, log_decays, rates, inverses, states, corrections, grad_output, grad_query, grad_key,
    grad_value, grad_log_decays, grad_rates, rows, qkv_stride, grad_value_stride, heads,
    group_size, key_start, value_start, scale,
    CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and keys for each value head, of values, log decays and rates."""
    row_number = tl.program_id(0)
    head = tl.program_id(1)
    start = tl.load(rows + 3 * row_number)
    stop = tl.load(rows + 3 * row_number + 1)
    chunk = tl.load(rows + 3 * row_number + 2).to(tl.int64)
    query_column = head // group_size * KEYS
    value_column = value_start + head * VALUES
    row = tl.arange(0, CHUNK)
    is_lower = row[:, None] >= row[None, :]
    is_strictly_lower = row[:, None] > row[None, :]
    square = row[:, None] * CHUNK + row[None, :]
    cells = tl.arange(0, KEYS)[:, None] * VALUES + tl.arange(0, VALUES)[None, :]
    chunk_count = tl.cdiv(stop - start, CHUNK)
    grad_state = tl.zeros((KEYS, VALUES), tl.float32)
    # From the last chunk to the first.
    for back in range(0, chunk_count):
        number = chunk_count - 1 - back
        tokens = start + number * CHUNK + row
        mask = tokens < stop
        place = (chunk + number) * heads + head
        raw_keys = _load_columns(
            qkv, tokens, qkv_stride, key_start + query_column, mask, KEYS
        )
        keys, inverse_key = _normalize(raw_keys)
        sums, total, pairs, chunk_rates = _load_gates(
            log_decays, rates, tokens, heads, head, mask, CHUNK
        )
        growth = tl.exp(sums)
        decay = tl.exp(total)
        remaining = tl.exp(total - sums)
        inverse = tl.load(inverses + place * CHUNK * CHUNK + square)
        state = tl.load(states + place * KEYS * VALUES + cells)
        correction = _load_columns(
            corrections, tokens, heads * VALUES, head * VALUES, mask, VALUES
        )
        grads = _load_columns(
            grad_output, tokens, heads * VALUES, head * VALUES, mask, VALUES
        )
        # The state after the chunk.
        grad_decayed = _multiply(correction, tl.trans(grad_state), DTYPE)
        grad_correction = _multiply(keys * remaining[:, None], grad_state, DTYPE)
        grad_total = tl.sum(tl.sum(state.to(tl.float32) * grad_state, 1), 0) * decay
        grad_state = decay * grad_state
        # The outputs.
        raw_queries = _load_columns(qkv, tokens, qkv_stride, query_column, mask, KEYS)
        queries, inverse_query = _normalize(raw_queries)
        scaled = queries * scale
        scores = _multiply(scaled, tl.trans(keys), DTYPE) * pairs
        grad_correction += _multiply(tl.trans(scores), grads, DTYPE)
        grad_grown = _multiply(grads, tl.trans(state), DTYPE)
        grad_state += _multiply(tl.trans(scaled * growth[:, None]), grads, DTYPE)
        grad_scores = _multiply(grads, tl.trans(correction), DTYPE)
        grad_scores = tl.where(is_lower, grad_scores, 0.0)
        grad_sums_pairs = grad_scores * scores
        grad_products = grad_scores * pairs
        grad_scaled = grad_grown * growth[:, None]
        grad_scaled += _multiply(grad_products, keys, DTYPE)
        grad_sums = tl.sum(grad_grown * scaled, 1) * growth
        grad_keys = _multiply(tl.trans(grad_products), scaled, DTYPE)
        grad_raw = _normalize_backward(grad_scaled * scale, queries, inverse_query)
        _store_columns(
            grad_query, grad_raw, tokens, heads * KEYS, head * KEYS, mask, KEYS
        )
        # The decayed keys.
        grad_keys += grad_decayed * remaining[:, None]
        grad_remaining = tl.sum(grad_decayed * keys, 1) * remaining
        grad_sums -= grad_remaining
        grad_total += tl.sum(grad_remaining, 0)
        # n = u - w S.
        rated_keys = keys * (chunk_rates * growth)[:, None]
        weights = _multiply(inverse, rated_keys, DTYPE)
        grad_weights = -_multiply(grad_correction, tl.trans(state), DTYPE)
        grad_state -= _multiply(tl.trans(weights), grad_correction, DTYPE)
        values = _load_columns(qkv, tokens, qkv_stride, value_column, mask, VALUES)
        rated_values = values * chunk_rates[:, None]
        grad_inverse = _multiply(grad_correction, tl.trans(rated_values), DTYPE)
        grad_inverse += _multiply(grad_weights, tl.trans(rated_keys), DTYPE)
        transposed = tl.trans(inverse)
        grad_rated_values = _multiply(transposed, grad_correction, DTYPE)
        grad_rated_keys = _multiply(transposed, grad_weights, DTYPE)
        _store_columns(
            grad_value, grad_rated_values * chunk_rates[:, None], tokens, grad_value_stride,
            head * VALUES, mask, VALUES
        )  # fmt: skip
        grad_rate = tl.sum(grad_rated_values * values, 1)
        along_keys = tl.sum(grad_rated_keys * keys, 1) * growth
        grad_rate += along_keys
        grad_sums += along_keys * chunk_rates
        grad_keys += grad_rated_keys * (chunk_rates * growth)[:, None]
        # T = (I + A)⁻¹.
        grad_system = -_multiply(
            transposed, _multiply(grad_inverse, transposed, DTYPE), DTYPE
        )
        grad_system = tl.where(is_strictly_lower, grad_system, 0.0)
        system, products = _lower_system(keys, pairs, chunk_rates, CHUNK, DTYPE)
        grad_rate += tl.sum(grad_system * products, 1)
        grad_sums_pairs += grad_system * system
        grad_products = grad_system * chunk_rates[:, None] * pairs
        grad_keys += _multiply(grad_products + tl.trans(grad_products), keys, DTYPE)
        grad_raw = _normalize_backward(grad_keys, keys, inverse_key)
        _store_columns(
            grad_key, grad_raw, tokens, heads * KEYS, head * KEYS, mask, KEYS
        )
        # G: exp(G[i] - G[j]) in `pairs`; then each log decay is in all later sums.
        grad_sums += tl.sum(grad_sums_pairs, 1) - tl.sum(grad_sums_pairs, 0)
        later = tl.sum(grad_sums, 0) - tl.cumsum(grad_sums, 0) + grad_sums
        offsets = tokens * heads + head
        tl.store(grad_log_decays + offsets, later + grad_total, mask=mask)
        tl.store(grad_rates + offsets, grad_rate, mask=mask)
