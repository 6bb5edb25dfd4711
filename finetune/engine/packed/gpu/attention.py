"""Attention of many short rows on a GPU, as Triton kernels: each row sees itself and the beginning it shares.

FlashAttention-2 (Dao, 2023) in the form of Triton's own tutorial, forward and backward, with a table of blocks that
holds no empty ones, and no copies of what rows share.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from finetune.engine.packed.batch import Span
from finetune.engine.packed.gpu.kernels import launch, rotate
from finetune.model.device import to_device

BLOCK, STEP = 64, 32
"""Tokens of one program, and of those that it goes over, so many at a time."""


class Rows:
    """The spans of a line as the kernels read them, and blocks of tokens, each within one span."""

    def __init__(self, spans: Sequence[Span], positions: torch.Tensor) -> None:
        ends = {span.start: span.start + span.length for span in spans}
        followers = dict(ends)
        for span in spans:
            if span.shared:
                followers[span.beginning] = max(followers[span.beginning], span.start + span.length)
        table = [
            (span.start, ends[span.start], span.beginning, span.beginning + span.shared, followers[span.start])
            for span in spans
        ]
        blocks = [
            (number, first)
            for number, span in enumerate(spans)
            for first in range(span.start, span.start + span.length, BLOCK)
        ]
        device = positions.device
        self.table = to_device(torch.tensor(table, dtype=torch.int32), device)
        """Of each span: its first token, the one after its last, the shared beginning's, and the one after the last
        that sees it."""
        self.blocks = to_device(torch.tensor(blocks, dtype=torch.int32), device)
        self.positions = positions.to(torch.int32)
        """Of each token in its own row."""


@dataclass(frozen=True)
class Attended:
    """Attention's output, and what its backward pass needs."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    out: torch.Tensor
    """[tokens, heads, width]"""
    sums: torch.Tensor
    """Logarithms (of base 2) of the softmax's denominators, float32 [heads, tokens]."""
    scale: float
    window: int


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows, scale: float, window: int | None
) -> Attended:
    """Shapes: query [tokens, heads, width], key and value [tokens, groups, width], all contiguous."""
    tokens, heads, width = query.shape
    out = torch.empty_like(query)
    sums = torch.empty(heads, tokens, device=query.device)
    most = 0 if window is None else window
    arguments = (
        query, key, value, out, sums, rows.positions, rows.blocks, rows.table, scale * LOG2, tokens, heads,
        heads // key.shape[1], width, most,
    )  # fmt: skip
    launch(_attend, (len(rows.blocks), heads, 1), arguments, _constants(width, most), 4, 3)
    return Attended(query, key, value, out, sums, scale, most)


def attend_backward(
    gradient: torch.Tensor, attended: Attended, rows: Rows, turn: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of queries, keys and values.

    `turn`: the cos and sin by which queries and keys were rotated; their gradients are those of before.
    """
    query, key, value = attended.query, attended.key, attended.value
    tokens, heads, width = query.shape
    into_query, into_key, into_value = (torch.empty_like(part) for part in (query, key, value))
    shared = torch.empty_like(attended.sums)
    constants = _constants(width, attended.window)
    turns = turn is not None and constants[1] == width  # its halves must be halves of the block
    common = (
        *(turn or (query, query)), query, key, value, gradient, attended.sums, shared, rows.positions, rows.blocks,
        rows.table,
        attended.scale * LOG2, attended.scale, tokens, heads, heads // key.shape[1], width, attended.window,
    )  # fmt: skip
    blocks = len(rows.blocks)
    launch(_attend_queries, (blocks, heads, 1), (into_query, attended.out, *common), (turns, *constants), 4, 3)
    launch(_attend_keys, (blocks, key.shape[1], 1), (into_key, into_value, *common), (turns, *constants), 4, 2)
    if turn is not None and not turns:
        into_query, into_key = (rotate(part, *turn, -1.0) for part in (into_query, into_key))
    return into_query, into_key, into_value


LOG2 = 1.4426950408889634
"""exp(x) is 2 to the power of so much x."""


def _constants(width: int, window: int) -> tuple[Any, ...]:
    return window > 0, max(16, triton.next_power_of_2(width)), BLOCK, STEP


@triton.jit
def _block(blocks, table):
    """This program's block of tokens: its first, and the row of its span in the table."""
    block = blocks + 2 * tl.program_id(0)
    return tl.load(block + 1), table + 5 * tl.load(block)


@triton.jit
def _tile(base, tokens, heads, head, width, columns, own):
    """Some tokens' part of a head [tokens, width]."""
    places = (tokens.to(tl.int64)[:, None] * heads + head) * width + columns[None, :]
    return tl.load(base + places, mask=own[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def _put(base, values, cos, sin, tokens, heads, head, width, own, TURNS: tl.constexpr, WIDTH: tl.constexpr):
    """Store some tokens' part of a head [tokens, width]; turned back, where it is the gradient of what was rotated."""
    first = (tokens.to(tl.int64)[:, None] * heads + head) * width
    if TURNS:
        half: tl.constexpr = WIDTH // 2
        columns = tl.arange(0, half)[None, :]
        places = tokens.to(tl.int64)[:, None] * width + columns
        c = tl.load(cos + places, mask=own[:, None], other=0.0).to(tl.float32)
        s = tl.load(sin + places, mask=own[:, None], other=0.0).to(tl.float32)
        one, other = tl.split(tl.permute(tl.reshape(values, (values.shape[0], 2, half)), (0, 2, 1)))
        tl.store(base + first + columns, (one * c + other * s).to(base.dtype.element_ty), mask=own[:, None])
        tl.store(base + first + columns + half, (other * c - one * s).to(base.dtype.element_ty), mask=own[:, None])
    else:
        columns = tl.arange(0, WIDTH)[None, :]
        tl.store(base + first + columns, values.to(base.dtype.element_ty), mask=own[:, None] & (columns < width))


@triton.jit
def _position(positions, tokens, there, WINDOW: tl.constexpr):
    """Of tokens in their own rows; without a window their order in the line says as much, and needs no loads."""
    if WINDOW:
        return tl.load(positions + tokens, mask=there, other=0)
    else:
        return tokens


@triton.jit
def _seen(of_query, of_key, there, window, WINDOW: tl.constexpr):
    """Which keys a query may see, by what `_position` says of both."""
    distance = of_query - of_key
    seen = there & (distance >= 0)
    if WINDOW:
        seen = seen & (distance < window)
    return seen


@triton.jit
def _others(
    key, value, positions, at, end, of_query, heads, group, head, width, columns, window,
    WINDOW: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A block of keys from `at` on, their values, and which of them each query sees."""
    others = at + tl.arange(0, STEP)
    there = others < end
    keys = _tile(key, others, heads // group, head // group, width, columns, there)
    values = _tile(value, others, heads // group, head // group, width, columns, there)
    of_key = _position(positions, others, there, WINDOW)
    return keys, values, _seen(of_query[:, None], of_key[None, :], there[None, :], window, WINDOW)


@triton.jit(do_not_specialize=["tokens"])  # or multiples of 16 would compile it anew
def _attend(
    query, key, value, out, sums, positions, blocks, table, scale, tokens, heads, group, width, window,
    WINDOW: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    first, span = _block(blocks, table)
    start, stop, beginning, beginning_stop = tl.load(span), tl.load(span + 1), tl.load(span + 2), tl.load(span + 3)
    head = tl.program_id(1)
    rows, columns = first + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    own = rows < stop
    of_query = _position(positions, rows, own, WINDOW)
    queries = _tile(query, rows, heads, head, width, columns, own)
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    result = tl.zeros((BLOCK, WIDTH), tl.float32)
    for part in tl.static_range(2):
        begin, end = (beginning, beginning_stop) if part == 0 else (start, tl.minimum(first + BLOCK, stop))
        for at in range(begin, end, STEP):
            keys, values, seen = _others(
                key, value, positions, at, end, of_query, heads, group, head, width, columns, window, WINDOW, STEP
            )
            scores = tl.where(seen, tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale, -float("inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            level = tl.where(higher == -float("inf"), 0.0, higher)
            weights = tl.exp2(scores - level[:, None])
            fade = tl.exp2(top - level)
            total = total * fade + tl.sum(weights, 1)
            result = tl.dot(weights.to(values.dtype), values, result * fade[:, None], input_precision="ieee")
            top = higher
    total = tl.where(own, total, 1.0)
    tl.store(sums + head * tokens + rows, top + tl.log2(total), mask=own)
    _put(out, result / total[:, None], out, out, rows, heads, head, width, own, False, WIDTH)


@triton.jit(do_not_specialize=["tokens"])  # or multiples of 16 would compile it anew
def _attend_queries(
    into_query, out, cos, sin, query, key, value, gradient, sums, shared, positions, blocks, table, scale, slope_scale,
    tokens, heads, group, width, window,
    TURNS: tl.constexpr, WINDOW: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    first, span = _block(blocks, table)
    start, stop, beginning, beginning_stop = tl.load(span), tl.load(span + 1), tl.load(span + 2), tl.load(span + 3)
    head = tl.program_id(1)
    rows, columns = first + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    own = rows < stop
    of_query = _position(positions, rows, own, WINDOW)
    queries = _tile(query, rows, heads, head, width, columns, own)
    slopes = _tile(gradient, rows, heads, head, width, columns, own)
    level = tl.load(sums + head * tokens + rows, mask=own, other=0.0)
    outputs = _tile(out, rows, heads, head, width, columns, own)
    common = tl.sum(slopes.to(tl.float32) * outputs.to(tl.float32), 1)  # to all keys; the keys' own kernel reads it
    tl.store(shared + head * tokens + rows, common, mask=own)
    result = tl.zeros((BLOCK, WIDTH), tl.float32)
    for part in tl.static_range(2):
        begin, end = (beginning, beginning_stop) if part == 0 else (start, tl.minimum(first + BLOCK, stop))
        for at in range(begin, end, STEP):
            keys, values, seen = _others(
                key, value, positions, at, end, of_query, heads, group, head, width, columns, window, WINDOW, STEP
            )
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale - level[:, None]
            weights = tl.exp2(tl.where(seen, scores, -float("inf")))
            into_scores = weights * (tl.dot(slopes, tl.trans(values), input_precision="ieee") - common[:, None])
            result = tl.dot(into_scores.to(keys.dtype), keys, result, input_precision="ieee")
    _put(into_query, result * slope_scale, cos, sin, rows, heads, head, width, own, TURNS, WIDTH)


@triton.jit(do_not_specialize=["tokens"])  # or multiples of 16 would compile it anew
def _attend_keys(
    into_key, into_value, cos, sin, query, key, value, gradient, sums, shared, positions, blocks, table, scale,
    slope_scale, tokens, heads, group, width, window,
    TURNS: tl.constexpr, WINDOW: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    first, span = _block(blocks, table)
    stop, followers = tl.load(span + 1), tl.load(span + 4)
    place = tl.program_id(1)
    rows, columns = first + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    own = rows < stop
    of_key = _position(positions, rows, own, WINDOW)
    keys = _tile(key, rows, heads // group, place, width, columns, own)
    values = _tile(value, rows, heads // group, place, width, columns, own)
    result_key, result_value = tl.zeros((BLOCK, WIDTH), tl.float32), tl.zeros((BLOCK, WIDTH), tl.float32)
    for head in range(place * group, (place + 1) * group):
        for part in tl.static_range(2):  # its own span from here on, and the rows of which it is the beginning
            begin, end = (first, stop) if part == 0 else (stop, followers)
            for at in range(begin, end, STEP):
                others = at + tl.arange(0, STEP)
                there = others < end
                queries = _tile(query, others, heads, head, width, columns, there)
                slopes = _tile(gradient, others, heads, head, width, columns, there)
                level = tl.load(sums + head * tokens + others, mask=there, other=0.0)
                common = tl.load(shared + head * tokens + others, mask=there, other=0.0)
                of_query = _position(positions, others, there, WINDOW)
                seen = _seen(of_query[None, :], of_key[:, None], there[None, :] & own[:, None], window, WINDOW)
                scores = tl.dot(keys, tl.trans(queries), input_precision="ieee") * scale - level[None, :]
                weights = tl.exp2(tl.where(seen, scores, -float("inf")))
                result_value = tl.dot(weights.to(slopes.dtype), slopes, result_value, input_precision="ieee")
                into_scores = weights * (tl.dot(values, tl.trans(slopes), input_precision="ieee") - common[None, :])
                result_key = tl.dot(into_scores.to(queries.dtype), queries, result_key, input_precision="ieee")
    groups = heads // group
    _put(into_key, result_key * slope_scale, cos, sin, rows, groups, place, width, own, TURNS, WIDTH)
    _put(into_value, result_value, cos, sin, rows, groups, place, width, own, False, WIDTH)
