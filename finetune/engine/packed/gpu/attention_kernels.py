"""Triton kernels of FlashAttention-2 (Dao, 2023) over the spans of a packed batch.

Written after the fused attention of Triton's tutorials. A program of the forward kernel and of the
queries' backward kernel owns a block of queries and goes over the keys that these see: the shared
prefix, then the span up to the end of the block. A program of the keys' backward kernel owns a
block of keys and goes over the queries that see them: the rest of the span, then the spans that
share it. STEP, the tokens of one step, divides BLOCK: those before a block are whole steps.

Scores are scaled by LOG2_E as well, because a GPU computes 2 ** x faster than exp(x). Products get
`input_precision="ieee"`: Triton would otherwise round float32 operands to TF32.
"""

import triton
import triton.language as tl

from finetune.engine.packed.gpu.element_access import load_float32, store_rounded


@triton.jit
def _load_block(blocks, spans):
    """This program's first token, and the row of its span in `SpanTables.spans`."""
    block = blocks + 2 * tl.program_id(0)
    span = tl.load(block)
    first_token = tl.load(block + 1)
    return first_token, spans + 5 * span


@triton.jit
def _load_span(span):
    """Start, stop, prefix start, prefix stop, and one past the span's last reader."""
    start = tl.load(span)
    stop = tl.load(span + 1)
    prefix_start = tl.load(span + 2)
    prefix_stop = tl.load(span + 3)
    last_reader = tl.load(span + 4)
    return start, stop, prefix_start, prefix_stop, last_reader


@triton.jit
def _load_head(
    base,
    tokens,
    stride,
    head,
    head_dim,
    columns,
    token_mask,
):
    """One head of some tokens [tokens, head_dim]; the stride is from token to token."""
    # 64 bits: a long batch has more elements than 32 bits can count.
    first_element = tokens.to(tl.int64)[:, None] * stride + head * head_dim
    offsets = first_element + columns[None, :]
    mask = token_mask[:, None] & (columns < head_dim)[None, :]
    return tl.load(base + offsets, mask=mask, other=0.0)


@triton.jit
def _store_head(
    base, values, cos, sin, tokens, stride, head, head_dim, token_mask,
    ROTATE_BACK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Store one head of some tokens [tokens, head_dim].

    ROTATE_BACK: the values are the gradient of a rotated head; store that before the rotation.
    """
    first_element = tokens.to(tl.int64)[:, None] * stride + head * head_dim
    if ROTATE_BACK:
        half: tl.constexpr = HEAD_DIM // 2
        columns = tl.arange(0, half)[None, :]
        angle_offsets = tokens.to(tl.int64)[:, None] * head_dim + columns
        mask = token_mask[:, None]
        c = load_float32(cos, angle_offsets, mask)
        s = load_float32(sin, angle_offsets, mask)
        # `tl.split` splits the last dimension, so the two halves of a head have to get there.
        halves = tl.reshape(values, (values.shape[0], 2, half))
        first, second = tl.split(tl.permute(halves, (0, 2, 1)))
        offsets = first_element + columns
        store_rounded(
            base,
            offsets,
            first * c + second * s,
            mask,
        )
        store_rounded(
            base + half,
            offsets,
            second * c - first * s,
            mask,
        )
    else:
        columns = tl.arange(0, HEAD_DIM)[None, :]
        mask = token_mask[:, None] & (columns < head_dim)
        store_rounded(
            base,
            first_element + columns,
            values,
            mask,
        )


@triton.jit
def _load_positions(
    position_ids,
    tokens,
    token_mask,
    WINDOW: tl.constexpr,
):
    """Positions of tokens in their rows; without a window the order of tokens is enough."""
    if WINDOW:
        return tl.load(position_ids + tokens, mask=token_mask, other=0)
    else:
        return tokens


@triton.jit
def _attention_mask(
    query_positions,
    key_positions,
    mask,
    window,
    WINDOW: tl.constexpr,
):
    """Which keys a query sees, from the positions that `_load_positions` gives."""
    distance = query_positions - key_positions
    visible = mask & (distance >= 0)
    if WINDOW:
        visible = visible & (distance < window)
    return visible


@triton.jit
def _load_keys(
    key, value, tokens, token_mask, key_stride, group_size, head, head_dim, columns,
):  # fmt: skip
    """The keys and values of some tokens."""
    key_head = head // group_size
    keys = _load_head(key, tokens, key_stride, key_head, head_dim, columns, token_mask)
    values = _load_head(
        value, tokens, key_stride, key_head, head_dim, columns, token_mask
    )
    return keys, values


@triton.jit
def _visible_keys(
    position_ids, query_positions, tokens, token_mask, window,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Which keys each query sees [queries, keys]."""
    key_positions = _load_positions(position_ids, tokens, token_mask, WINDOW)
    return _attention_mask(
        query_positions[:, None],
        key_positions[None, :],
        token_mask[None, :],
        window,
        WINDOW,
    )


@triton.jit
def _softmax_step(scores, scale, maximum, denominator):
    """Go over further scores of an online softmax (Milakov and Gimelshein, 2018).

    The scores are still to be scaled; maximum and denominator are of scaled ones. Returns the new
    maximum and denominator, the weights of these scores, and the factor by which the weights of
    earlier scores shrink.
    """
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale)
    # A query that sees no key yet has the maximum -inf, and -inf - -inf would be NaN.
    finite_maximum = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)
    weights = tl.exp2(scores * scale - finite_maximum[:, None])
    rescale = tl.exp2(maximum - finite_maximum)
    denominator = denominator * rescale + tl.sum(weights, 1)
    return new_maximum, denominator, weights, rescale


# Not specialised: numbers of tokens that are multiples of 16 would be compiled separately.
@triton.jit(do_not_specialize=["token_count"])
def attention_kernel(
    query, key, value, output, log_sum_exp, position_ids, blocks, spans, scale, token_count,
    query_stride, key_stride, heads, group_size, head_dim, window,
    WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """output = softmax(scale · query keyᵀ) value, and the softmax's log-sum-exp."""
    tl.static_assert(BLOCK % STEP == 0)
    first, span = _load_block(blocks, spans)
    start, stop, prefix_start, prefix_stop, _ = _load_span(span)
    head = tl.program_id(1)
    tokens = first + tl.arange(0, BLOCK)
    token_mask = tokens < stop
    columns = tl.arange(0, HEAD_DIM)
    query_positions = _load_positions(position_ids, tokens, token_mask, WINDOW)
    queries = _load_head(
        query, tokens, query_stride, head, head_dim, columns, token_mask
    )
    maximum = tl.full((BLOCK,), -float("inf"), tl.float32)
    denominator = tl.zeros((BLOCK,), tl.float32)
    result = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
    # The shared prefix, the span before the block, and the block itself. No query sees a key behind
    # its block, and without a window all see those before it.
    for section in tl.static_range(3):
        if section == 0:
            begin = prefix_start
            end = prefix_stop
        elif section == 1:
            begin = start
            end = first
        else:
            begin = first
            end = tl.minimum(first + BLOCK, stop)
        for key_token in range(begin, end, STEP):
            key_tokens = key_token + tl.arange(0, STEP)
            key_mask = key_tokens < end
            keys, values = _load_keys(
                key, value, key_tokens, key_mask, key_stride, group_size, head, head_dim, columns
            )  # fmt: skip
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
            if section != 1 or WINDOW:
                visible = _visible_keys(
                    position_ids, query_positions, key_tokens, key_mask, window, WINDOW
                )
                scores = tl.where(visible, scores, -float("inf"))
            maximum, denominator, weights, rescale = _softmax_step(
                scores, scale, maximum, denominator
            )
            # Earlier weights were relative to an earlier maximum.
            rescaled = result * rescale[:, None]
            # Rounded to the values' dtype, because `tl.dot` takes two operands of the same dtype.
            result = tl.dot(
                weights.to(values.dtype),
                values,
                rescaled,
                input_precision="ieee",
            )
    # Beyond the span it may be 0.
    denominator = tl.where(token_mask, denominator, 1.0)
    query_log_sum_exp = maximum + tl.log2(denominator)
    tl.store(
        log_sum_exp + head * token_count + tokens, query_log_sum_exp, mask=token_mask
    )
    result = result / denominator[:, None]
    _store_head(
        output,
        result,
        output,
        output,
        tokens,
        heads * head_dim,
        head,
        head_dim,
        token_mask,
        False,
        HEAD_DIM,
    )


# Not specialised: numbers of tokens that are multiples of 16 would be compiled separately.
@triton.jit(do_not_specialize=["token_count"])
def attention_backward_query_kernel(
    grad_query, output, cos, sin, query, key, value, grad_output, log_sum_exp, output_grad_sum,
    position_ids, blocks, spans, scale, gradient_scale, token_count, query_stride, key_stride,
    heads, group_size, head_dim, window,
    ROTATE_BACK: tl.constexpr, WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries; writes output · gradient of each query for the next kernel."""
    tl.static_assert(BLOCK % STEP == 0)
    first, span = _load_block(blocks, spans)
    start, stop, prefix_start, prefix_stop, _ = _load_span(span)
    head = tl.program_id(1)
    tokens = first + tl.arange(0, BLOCK)
    token_mask = tokens < stop
    columns = tl.arange(0, HEAD_DIM)
    query_positions = _load_positions(position_ids, tokens, token_mask, WINDOW)
    queries = _load_head(
        query, tokens, query_stride, head, head_dim, columns, token_mask
    )
    output_stride = heads * head_dim
    grads = _load_head(
        grad_output, tokens, output_stride, head, head_dim, columns, token_mask
    )
    # Of this head, in tensors with one number for each query [heads, tokens].
    first_query = head * token_count
    query_log_sum_exp = tl.load(
        log_sum_exp + first_query + tokens, mask=token_mask, other=0.0
    )
    outputs = _load_head(
        output, tokens, output_stride, head, head_dim, columns, token_mask
    )
    grad_sums = tl.sum(grads.to(tl.float32) * outputs.to(tl.float32), 1)
    tl.store(output_grad_sum + first_query + tokens, grad_sums, mask=token_mask)
    result = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
    # The shared prefix, the span before the block, and the block itself. No query sees a key behind
    # its block, and without a window all see those before it.
    for section in tl.static_range(3):
        if section == 0:
            begin = prefix_start
            end = prefix_stop
        elif section == 1:
            begin = start
            end = first
        else:
            begin = first
            end = tl.minimum(first + BLOCK, stop)
        for key_token in range(begin, end, STEP):
            key_tokens = key_token + tl.arange(0, STEP)
            key_mask = key_tokens < end
            keys, values = _load_keys(
                key, value, key_tokens, key_mask, key_stride, group_size, head, head_dim, columns
            )  # fmt: skip
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
            log_weights = scores * scale - query_log_sum_exp[:, None]
            if section != 1 or WINDOW:
                visible = _visible_keys(
                    position_ids, query_positions, key_tokens, key_mask, window, WINDOW
                )
                log_weights = tl.where(visible, log_weights, -float("inf"))
            # The stored log-sum-exp gives the softmax at once, so nothing has to be rescaled here.
            weights = tl.exp2(log_weights)
            # Through the softmax: each weight times its gradient's distance from the row's mean.
            grad_weights = tl.dot(grads, tl.trans(values), input_precision="ieee")
            grad_scores = weights * (grad_weights - grad_sums[:, None])
            result = tl.dot(
                grad_scores.to(keys.dtype),
                keys,
                result,
                input_precision="ieee",
            )
    # Without LOG2_E, which only belongs to the scores' powers of 2.
    result = result * gradient_scale
    _store_head(
        grad_query, result, cos, sin, tokens, query_stride, head, head_dim, token_mask,
        ROTATE_BACK, HEAD_DIM
    )  # fmt: skip


@triton.jit
def _load_queries(
    query, grad_output, log_sum_exp, output_grad_sum, tokens, token_mask, token_count,
    query_stride, heads, head, head_dim, columns,
):  # fmt: skip
    """Some queries, their outputs' gradients, log-sum-exps and sums of output · gradient.

    All are zeros beyond the mask.
    """
    queries = _load_head(
        query, tokens, query_stride, head, head_dim, columns, token_mask
    )
    output_stride = heads * head_dim
    grads = _load_head(
        grad_output, tokens, output_stride, head, head_dim, columns, token_mask
    )
    first_query = head * token_count
    query_log_sum_exp = tl.load(
        log_sum_exp + first_query + tokens, mask=token_mask, other=0.0
    )
    grad_sums = tl.load(
        output_grad_sum + first_query + tokens, mask=token_mask, other=0.0
    )
    return queries, grads, query_log_sum_exp, grad_sums


# Not specialised: numbers of tokens that are multiples of 16 would be compiled separately.
@triton.jit(do_not_specialize=["token_count"])
def attention_backward_key_value_kernel(
    grad_key, grad_value, cos, sin, query, key, value, grad_output, log_sum_exp, output_grad_sum,
    position_ids, blocks, spans, scale, gradient_scale, token_count, query_stride, key_stride,
    heads, group_size, head_dim, window,
    ROTATE_BACK: tl.constexpr, WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values, summed over the query heads that share a key head."""
    first, span = _load_block(blocks, spans)
    _, stop, _, _, last_reader = _load_span(span)
    key_head = tl.program_id(1)
    tokens = first + tl.arange(0, BLOCK)
    token_mask = tokens < stop
    columns = tl.arange(0, HEAD_DIM)
    key_positions = _load_positions(position_ids, tokens, token_mask, WINDOW)
    keys = _load_head(key, tokens, key_stride, key_head, head_dim, columns, token_mask)
    values = _load_head(
        value, tokens, key_stride, key_head, head_dim, columns, token_mask
    )
    key_result = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
    value_result = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
    first_head = key_head * group_size
    block_stop = tl.minimum(first + BLOCK, stop)
    # All query heads that share the keys in one program: no two add to the same gradient.
    for head in range(first_head, first_head + group_size):
        # The block itself; then the rest of the span and the rows that share it, whose queries see
        # all keys without a window. Beyond the last query gradients are zeros, and add nothing.
        for section in tl.static_range(2):
            if section == 0:
                begin = first
                end = block_stop
            else:
                begin = block_stop
                end = last_reader
            for query_token in range(begin, end, STEP):
                query_tokens = query_token + tl.arange(0, STEP)
                query_mask = query_tokens < end
                queries, grads, query_log_sum_exp, grad_sums = _load_queries(
                    query, grad_output, log_sum_exp, output_grad_sum, query_tokens, query_mask,
                    token_count, query_stride, heads, head, head_dim, columns
                )  # fmt: skip
                # Transposed, keys by queries, so that the sums over queries below are products.
                scores = tl.dot(keys, tl.trans(queries), input_precision="ieee")
                log_weights = scores * scale - query_log_sum_exp[None, :]
                if section == 0 or WINDOW:
                    query_positions = _load_positions(
                        position_ids, query_tokens, query_mask, WINDOW
                    )
                    visible = _attention_mask(
                        query_positions[None, :],
                        key_positions[:, None],
                        query_mask[None, :] & token_mask[:, None],
                        window,
                        WINDOW,
                    )
                    log_weights = tl.where(visible, log_weights, -float("inf"))
                weights = tl.exp2(log_weights)
                value_result = tl.dot(
                    weights.to(grads.dtype),
                    grads,
                    value_result,
                    input_precision="ieee",
                )
                grad_weights = tl.dot(values, tl.trans(grads), input_precision="ieee")
                grad_scores = weights * (grad_weights - grad_sums[None, :])
                key_result = tl.dot(
                    grad_scores.to(queries.dtype),
                    queries,
                    key_result,
                    input_precision="ieee",
                )
    key_result = key_result * gradient_scale
    _store_head(
        grad_key, key_result, cos, sin, tokens, key_stride, key_head, head_dim, token_mask,
        ROTATE_BACK, HEAD_DIM
    )  # fmt: skip
    _store_head(
        grad_value, value_result, cos, sin, tokens, key_stride, key_head, head_dim, token_mask,
        False, HEAD_DIM
    )  # fmt: skip
