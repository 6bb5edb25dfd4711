"""Triton kernels: on a GPU, one launch each for what PyTorch would do in many, every one over all of memory again.

Numbers are computed in float32 and rounded once, to the dtype of the tensor that they are put into.
"""

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 1024
"""Elements of one program where elements are independent."""

COLUMNS = 8
"""Of a slot's table, for each linear layer: 0 to 3 the addresses of A, B and their gradients, 4 the rank, 5 the
adapter's number, 6 the bits of its scaling, a float64; 7 keeps rows at 64 bytes."""

_compiled: dict[Any, Any] = {}


def launch(kernel: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], constants: tuple[Any, ...],
            warps: int = 4, stages: int = 3) -> None:  # fmt: skip
    """Run a kernel on the current device.

    Triton's own look at every argument takes longer than a kernel does: it is done once for each kind of what Triton
    compiles for, multiples of 16, ones, and numbers of more than 31 bits.
    """
    kinds = tuple(
        (part.dtype, part.data_ptr() % 16 == 0)
        if isinstance(part, torch.Tensor)
        else (part % 16 == 0, part == 1, part >> 31)
        for part in arguments
        if not isinstance(part, float)
    )
    key = (kernel, kinds, constants, warps, stages)
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*arguments, *constants, num_warps=warps, num_stages=stages)
    else:
        compiled[grid](*arguments, *constants)


def norm(
    x: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Root mean square normalisation of the rows of x + added [rows, width].

    Returns the sum, what it is normalised, and the inverse roots, float32 [rows].
    """
    rows, width = x.shape
    total = x if added is None else torch.empty_like(x)
    y, inverse = torch.empty_like(x), torch.empty(rows, device=x.device)
    arguments = (x, x if added is None else added, weight, total, y, inverse, width, epsilon)
    block, warps = _row(width)
    launch(_norm, (rows, 1, 1), arguments, (added is not None, block), warps)
    return total, y, inverse


def norm_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    inverse: torch.Tensor,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of what was normalised, plus `added`; nobody reads the weight's."""
    rows, width = x.shape
    into_x = torch.empty_like(x)
    arguments = (gradient, x, weight, inverse, x if added is None else added, into_x, width)
    block, warps = _row(width)
    launch(_norm_backward, (rows, 1, 1), arguments, (added is not None, block), warps)
    return into_x


def gate(gated: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gated) · up"""
    result, count = torch.empty_like(gated), gated.numel()
    launch(_gate, (triton.cdiv(count, BLOCK), 1, 1), (gated, up, result, count), (BLOCK,))
    return result


def gate_backward(gradient: torch.Tensor, gated: torch.Tensor, up: torch.Tensor, again: bool) -> torch.Tensor | None:
    """Put both factors' gradients where the factors were; the product again on demand, so that nobody need keep it.

    The product is where its gradient was.
    """
    count = gated.numel()
    launch(_gate_backward, (triton.cdiv(count, BLOCK), 1, 1), (gradient, gated, up, count), (again, BLOCK))
    return gradient if again else None


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    """Rotary position embedding (Su et al., 2021) of x [tokens, heads, width], by cos and sin [tokens, width].

    Sign -1 turns back, which is also the gradient's way.
    """
    tokens, heads, width = x.shape
    result = torch.empty_like(x)
    block = triton.next_power_of_2(width // 2)
    arguments = (x, cos, sin, result, heads, width, sign)
    launch(_rotate, (tokens, triton.cdiv(heads, 16), 1), arguments, (16, block))
    return result


def _row(width: int) -> tuple[int, int]:
    block = triton.next_power_of_2(width)
    return block, min(max(block // 512, 1), 16)


def score(
    logits: torch.Tensor, targets: torch.Tensor, learns: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Negative log-likelihoods of the targets, float32 [rows], and whether each is the likeliest token.

    Where it learns, the logits [rows, tokens] become the losses' gradient of them.
    """
    rows, width = logits.shape
    losses = torch.empty(rows, device=logits.device)
    right = torch.empty(rows, dtype=torch.bool, device=logits.device)
    arguments = (logits, targets, losses, right, width)
    launch(_score, (rows, 1, 1), arguments, (learns, min(4096, triton.next_power_of_2(width))), 8)
    return losses, right, logits if learns else None


class Places:
    """Where in a pass's tokens each slot's are, and its adapters: the tables that the products below read.

    `parts`: for each slot its first token, the one after its last, the key of its dropout masks and its dropout;
    `tables`: for each slot its table [layers, COLUMNS].
    """

    def __init__(self, parts: list[tuple[int, int, int, float]], tables: list[torch.Tensor], device: Any) -> None:
        tokens = max(stop for _, stop, _, _ in parts)
        self.tile = 64 if tokens >= 4096 else 16
        """Tokens of one program; small ones keep a large GPU busy with few tokens."""
        rows = [(start, stop, key, round(min(dropout, 1 - 2**-20) * 2**32)) for start, stop, key, dropout in parts]
        tiles = [
            (number, first)
            for number, (start, stop, _, _) in enumerate(parts)
            for first in range(start, stop, self.tile)
        ]
        joined = torch.stack(tables)
        self.rank = max(16, triton.next_power_of_2(int(joined[:, :, 4].max())))
        """Columns of what goes through the adapters: the largest rank, rounded up."""
        self.even = not bool((joined[:, :, 4] % 8).any() | (joined[:, :, :4] % 16).any())
        """Whether all ranks are multiples of eight and all addresses of 16 bytes, so that these are read at once."""
        self.parts, self.tiles, on_device = (
            part.to(device) for part in (torch.tensor(rows), torch.tensor(tiles, dtype=torch.int32), joined)
        )
        self.layers = on_device.unbind(1)
        """Each layer's rows of the tables [slots, COLUMNS]."""
        self.drops = any(dropout for _, _, _, dropout in parts)


def shrink(
    x: torch.Tensor, places: Places, layer: int, *, through_b: bool = False, dropped: bool = False
) -> torch.Tensor:
    """x Aᵀ [tokens, rank] of each slot's own A on its tokens of x [tokens, in]; or scaling · x B of its B."""
    tokens, width = x.shape
    rank, table = places.rank, places.layers[layer]
    h = torch.empty(tokens, rank, dtype=x.dtype, device=x.device)
    drops, ranks = dropped and places.drops, min(rank, 128)
    if x.dtype == torch.float32 or (drops and places.tile == 64):
        inner, warps, stages = 64, 4, 4
    else:
        inner, warps, stages = (128, 8, 3) if places.tile == 64 else (256, 8, 2)
    grid = (len(places.tiles), triton.cdiv(rank, ranks), 1)
    arguments = (x, h, table, places.parts, places.tiles, table.stride(0), width)
    launch(_shrink, grid, arguments, (through_b, drops, places.even, rank, places.tile, ranks, inner), warps, stages)
    return h


def expand(
    y: torch.Tensor,
    h: torch.Tensor,
    places: Places,
    layer: int,
    *,
    through_a: bool = False,
    dropped: bool = False,
    fresh: bool = False,
) -> None:
    """Add scaling · h Bᵀ to y [tokens, out], each slot's B to its own tokens; or h A. `fresh`: y holds nothing yet."""
    width, rank, table = y.shape[1], places.rank, places.layers[layer]
    large = places.tile == 64
    grid = (len(places.tiles), triton.cdiv(width, 128), 1)
    arguments = (y, h, table, places.parts, places.tiles, table.stride(0), width)
    constants = (through_a, dropped and places.drops, places.even, fresh, rank, places.tile, min(rank, 64), 128)
    launch(_expand, grid, arguments, constants, 8 if large else 4, 2)


def collect(
    x: torch.Tensor, h: torch.Tensor, places: Places, layer: int, *, of_b: bool = False, dropped: bool = False
) -> None:
    """Add hᵀ x, summed over each slot's tokens, to its gradient of A; or scaling · xᵀ h to that of B."""
    width, rank, table = x.shape[1], places.rank, places.layers[layer]
    ranks = min(rank, 64)
    grid = (len(places.parts), triton.cdiv(width, 64), triton.cdiv(rank, ranks))
    arguments = (x, h, table, places.parts, table.stride(0), width)
    launch(_collect, grid, arguments, (of_b, dropped and places.drops, places.even, rank, 64, ranks, 64))


@triton.jit
def _hash(x):
    """Mixes 32 bits (Wellons' lowbias32)."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _kept(part, number, tokens, columns):
    """Which elements dropout keeps: by the slot's key for this batch, the layer, the slot's token and the column."""
    key = tl.load(part + 2)
    low, high = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
    row = _hash(tokens.to(tl.uint32) + _hash(low ^ _hash(high + number.to(tl.uint32))))
    drawn = (columns.to(tl.uint32)[None, :] * 0x9E3779B1) ^ row[:, None]
    drawn = drawn * 0x7FEB352D  # of _hash so much as high bits need: this is most of what dropout costs
    drawn = (drawn ^ (drawn >> 15)) * 0x846CA68B
    return drawn >= tl.load(part + 3).to(tl.uint32)


@triton.jit
def _matrix(table, column: tl.constexpr, element: tl.constexpr, EVEN: tl.constexpr):
    """The address in a column of the table."""
    address = tl.load(table + column).to(tl.pointer_type(element))
    if EVEN:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def _rank(table, EVEN: tl.constexpr):
    rank = tl.load(table + 4).to(tl.int32)
    if EVEN:
        rank = tl.multiple_of(rank, 8)
    return rank


@triton.jit
def _scaling(part, table):
    """Of what the adapter adds; elements that dropout keeps stand for the others as well."""
    return tl.load(table + 6).to(tl.float64, bitcast=True).to(tl.float32) / (1 - tl.load(part + 3) / 4294967296)


@triton.jit
def _norm(x, added, weight, total, y, inverse, width, epsilon, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    there = columns < width
    exact = tl.load(x + row * width + columns, mask=there, other=0.0).to(tl.float32)
    if ADDS:
        exact += tl.load(added + row * width + columns, mask=there, other=0.0).to(tl.float32)
        rounded = exact.to(total.dtype.element_ty)
        tl.store(total + row * width + columns, rounded, mask=there)
        exact = rounded.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(exact * exact, 0) / width + epsilon)
    unit = (exact * scale).to(y.dtype.element_ty).to(tl.float32)
    weights = tl.load(weight + columns, mask=there, other=0.0).to(tl.float32)
    tl.store(y + row * width + columns, (unit * weights).to(y.dtype.element_ty), mask=there)
    tl.store(inverse + row, scale)


@triton.jit
def _norm_backward(gradient, x, weight, inverse, added, into_x, width, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    there = columns < width
    scale = tl.load(inverse + row)
    unit = tl.load(x + row * width + columns, mask=there, other=0.0).to(tl.float32) * scale
    slope = tl.load(gradient + row * width + columns, mask=there, other=0.0).to(tl.float32)
    slope *= tl.load(weight + columns, mask=there, other=0.0).to(tl.float32)
    shared = tl.sum(slope * unit, 0) / width
    result = (slope - unit * shared) * scale
    if ADDS:
        result += tl.load(added + row * width + columns, mask=there, other=0.0).to(tl.float32)
    tl.store(into_x + row * width + columns, result.to(into_x.dtype.element_ty), mask=there)


@triton.jit
def _gate(gated, up, result, count, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = places < count
    g = tl.load(gated + places, mask=there, other=0.0).to(tl.float32)
    u = tl.load(up + places, mask=there, other=0.0).to(tl.float32)
    tl.store(result + places, (g * tl.sigmoid(g) * u).to(result.dtype.element_ty), mask=there)


@triton.jit
def _gate_backward(gradient, gated, up, count, AGAIN: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = places < count
    slope = tl.load(gradient + places, mask=there, other=0.0).to(tl.float32)
    g = tl.load(gated + places, mask=there, other=0.0).to(tl.float32)
    u = tl.load(up + places, mask=there, other=0.0).to(tl.float32)
    share = tl.sigmoid(g)
    of_gated = slope * u * share * (1 + g * (1 - share))
    tl.store(gated + places, of_gated.to(gated.dtype.element_ty), mask=there)
    tl.store(up + places, (slope * g * share).to(up.dtype.element_ty), mask=there)
    if AGAIN:
        tl.store(gradient + places, (g * share * u).to(gradient.dtype.element_ty), mask=there)


@triton.jit
def _rotate(x, cos, sin, result, heads, width, sign, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half = width // 2
    columns = tl.arange(0, BLOCK)
    there = columns < half
    c = tl.load(cos + token * width + columns, mask=there, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * width + columns, mask=there, other=0.0).to(tl.float32)[None, :] * sign
    places = token * heads * width + head[:, None] * width + columns[None, :]
    both = (head < heads)[:, None] & there[None, :]
    first = tl.load(x + places, mask=both, other=0.0).to(tl.float32)
    second = tl.load(x + places + half, mask=both, other=0.0).to(tl.float32)
    tl.store(result + places, (first * c - second * s).to(result.dtype.element_ty), mask=both)
    tl.store(result + places + half, (second * c + first * s).to(result.dtype.element_ty), mask=both)


@triton.jit
def _score(logits, targets, losses, right, width, LEARNS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = logits + row * width
    target = tl.load(targets + row)
    highest, likeliest, total = -float("inf"), 0, 0.0
    for begin in range(0, width, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        values = tl.load(first + columns, mask=columns < width, other=-float("inf")).to(tl.float32)
        top = tl.max(values, 0)
        likeliest = tl.where(top > highest, begin + tl.argmax(values, 0), likeliest)
        higher = tl.maximum(top, highest)
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(values - higher), 0)
        highest = higher
    whole = highest + tl.log(total)
    tl.store(losses + row, whole - tl.load(first + target).to(tl.float32))
    tl.store(right + row, likeliest == target)
    if LEARNS:
        for begin in range(0, width, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            values = tl.load(first + columns, mask=columns < width, other=-float("inf")).to(tl.float32)
            slope = tl.exp(values - whole) - tl.where(columns == target, 1.0, 0.0)
            tl.store(first + columns, slope.to(logits.dtype.element_ty), mask=columns < width)


@triton.jit
def _tile(tiles, parts, tables, stride):
    """This program's tokens: the first, and the rows of their slot in both tables."""
    tile = tiles + 2 * tl.program_id(0)
    number = tl.load(tile)
    return tl.load(tile + 1), parts + 4 * number, tables + number * stride


@triton.jit
def _shrink(
    x, h, tables, parts, tiles, stride, width,
    THROUGH_B: tl.constexpr, DROPPED: tl.constexpr, EVEN: tl.constexpr, RANK: tl.constexpr,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    first, part, table = _tile(tiles, parts, tables, stride)
    rank = _rank(table, EVEN)
    if rank == 0:
        return
    start, stop = tl.load(part), tl.load(part + 1)
    tokens = first.to(tl.int64) + tl.arange(0, TOKENS)
    own = tokens < stop
    ranks = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    total = tl.zeros((TOKENS, RANKS), dtype=tl.float32)
    weight = _matrix(table, 1, x.dtype.element_ty, EVEN) if THROUGH_B else _matrix(table, 0, x.dtype.element_ty, EVEN)
    for begin in range(0, width, INNER):
        inner = begin + tl.arange(0, INNER)
        there = inner < width
        values = tl.load(x + tokens[:, None] * width + inner[None, :], mask=own[:, None] & there[None, :], other=0.0)
        if DROPPED:
            kept = _kept(part, tl.load(table + 5), tokens - start, inner)
            values = tl.where(kept, values, tl.zeros_like(values))
        places = inner[:, None] * rank + ranks[None, :] if THROUGH_B else ranks[None, :] * width + inner[:, None]
        weights = tl.load(weight + places, mask=there[:, None] & (ranks < rank)[None, :], other=0.0)
        total = tl.dot(values, weights, total, input_precision="ieee")
    if THROUGH_B:
        total *= _scaling(part, table)
    tl.store(h + tokens[:, None] * RANK + ranks[None, :], total.to(h.dtype.element_ty), mask=own[:, None])


@triton.jit
def _expand(
    y, h, tables, parts, tiles, stride, width,
    THROUGH_A: tl.constexpr, DROPPED: tl.constexpr, EVEN: tl.constexpr, FRESH: tl.constexpr, RANK: tl.constexpr,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, OUTER: tl.constexpr,
):  # fmt: skip
    first, part, table = _tile(tiles, parts, tables, stride)
    rank = _rank(table, EVEN)
    if rank == 0 and not FRESH:
        return
    start, stop = tl.load(part), tl.load(part + 1)
    tokens = first.to(tl.int64) + tl.arange(0, TOKENS)
    own = tokens < stop
    outer = tl.program_id(1) * OUTER + tl.arange(0, OUTER)
    there = outer < width
    total = tl.zeros((TOKENS, OUTER), dtype=tl.float32)
    weight = _matrix(table, 0, y.dtype.element_ty, EVEN) if THROUGH_A else _matrix(table, 1, y.dtype.element_ty, EVEN)
    for begin in tl.static_range(0, RANK, RANKS):
        ranks = begin + tl.arange(0, RANKS)
        here = own[:, None] & (ranks < rank)[None, :]
        low = tl.load(h + tokens[:, None] * RANK + ranks[None, :], mask=here, other=0.0)
        places = ranks[:, None] * width + outer[None, :] if THROUGH_A else outer[None, :] * rank + ranks[:, None]
        weights = tl.load(weight + places, mask=(ranks < rank)[:, None] & there[None, :], other=0.0)
        total = tl.dot(low, weights, total, input_precision="ieee")
    if not THROUGH_A:
        total *= _scaling(part, table)
    if DROPPED:
        total = tl.where(_kept(part, tl.load(table + 5), tokens - start, outer), total, 0.0)
    at = y + tokens[:, None] * width + outer[None, :]
    both = own[:, None] & there[None, :]
    if not FRESH:
        total += tl.load(at, mask=both, other=0.0).to(tl.float32)
    tl.store(at, total.to(y.dtype.element_ty), mask=both)


@triton.jit
def _collect(
    x, h, tables, parts, stride, width,
    OF_B: tl.constexpr, DROPPED: tl.constexpr, EVEN: tl.constexpr, RANK: tl.constexpr,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, OUTER: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    part, table = parts + 4 * number, tables + number * stride
    rank = _rank(table, EVEN)
    if rank == 0:
        return
    start, stop = tl.load(part), tl.load(part + 1)
    outer = tl.program_id(1) * OUTER + tl.arange(0, OUTER)
    there = outer < width
    ranks = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    total = tl.zeros((OUTER, RANKS), dtype=tl.float32)
    for begin in range(start, stop, TOKENS):
        tokens = begin + tl.arange(0, TOKENS)
        own = tokens < stop
        values = tl.load(x + tokens[:, None] * width + outer[None, :], mask=own[:, None] & there[None, :], other=0.0)
        if DROPPED:
            kept = _kept(part, tl.load(table + 5), tokens - start, outer)
            values = tl.where(kept, values, tl.zeros_like(values))
        low = tl.load(h + tokens[:, None] * RANK + ranks[None, :], mask=own[:, None], other=0.0)
        total = tl.dot(tl.trans(values), low, total, input_precision="ieee")
    if OF_B:
        total *= _scaling(part, table)
        at = _matrix(table, 3, tl.float32, EVEN) + outer[:, None] * rank + ranks[None, :]
    else:
        at = _matrix(table, 2, tl.float32, EVEN) + ranks[None, :] * width + outer[:, None]
    both = there[:, None] & (ranks < rank)[None, :]
    tl.store(at, tl.load(at, mask=both, other=0.0) + total, mask=both)
