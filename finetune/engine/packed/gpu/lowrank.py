"""The adapters of all slots at once on a GPU, as Triton kernels: each slot's own matrices on its own tokens.

An adapter takes a linear layer's input through A to its rank, `shrink`, and through B to what it adds to the layer's
output, `expand`. Layers with the same input are taken together. Dropout falls on the input, and is drawn anew where
it is needed. Nothing is padded to a common rank in memory but what lies between A and B.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from finetune.engine.packed.gpu.kernels import launch
from finetune.model.device import to_device

COLUMNS = 8
"""Of a slot's table, for each linear layer: 0 to 3 the addresses of A, B and their gradients, 4 the rank (0: no
adapter), 5 the adapter's number, 6 the bits of its scaling, a float64; 7 keeps rows at 64 bytes."""


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
            to_device(part, device) for part in (torch.tensor(rows), torch.tensor(tiles, dtype=torch.int32), joined)
        )
        self.layers = on_device.unbind(1)
        """Each layer's rows of the tables [slots, COLUMNS]."""
        self.drops = any(dropout for _, _, _, dropout in parts)


def shrink(x: torch.Tensor, places: Places, layer: int, count: int) -> torch.Tensor:
    """x Aᵀ [count, tokens, rank] of each slot's own A on its tokens of x [tokens, in].

    Of `count` layers with this input, from `layer` on in the tables; nothing is written of those without an adapter.
    """
    h = torch.empty(count, len(x), places.rank, dtype=x.dtype, device=x.device)
    _launch_shrink(x, h, places, layer, False)
    return h


def expand(h: torch.Tensor, places: Places, layer: int, width: int) -> torch.Tensor:
    """What the adapters add to a layer's output [tokens, width]: scaling · h Bᵀ, h [tokens, rank]."""
    return _launch_expand(h[None], places, layer, width, False)


def expand_backward(slope: torch.Tensor, h: torch.Tensor, into_h: torch.Tensor, places: Places, layer: int) -> None:
    """From the gradient of a layer's output [tokens, out]: put that of h into `into_h`, and B's into the slots."""
    _launch_collect(slope, h[None], places, layer, True)
    _launch_shrink(slope, into_h[None], places, layer, True)


def shrink_backward(into_h: torch.Tensor, places: Places, layer: int, width: int) -> torch.Tensor:
    """The gradient of the input [tokens, width] through the layers' adapters, from that of h."""
    return _launch_expand(into_h, places, layer, width, True)


def collect_a(x: torch.Tensor, into_h: torch.Tensor, places: Places, layer: int) -> None:
    """Put A's gradients of the layers with this input [tokens, in] into the slots."""
    _launch_collect(x, into_h, places, layer, False)


def _launch_shrink(x: torch.Tensor, h: torch.Tensor, places: Places, layer: int, through_b: bool) -> None:
    count, tokens, rank = h.shape
    table, ranks = places.layers[layer], min(rank, 128)
    drops = places.drops and not through_b
    if drops and places.tile == 64:
        inner, warps, stages = 64, 4, 4
    else:
        inner, warps, stages = (128, 8, 3) if places.tile == 64 else (256, 8, 2)
    grid = (count * (rank // ranks), len(places.tiles), 1)
    arguments = (x, h, table, places.parts, places.tiles, table.stride(0), x.shape[1], tokens)
    launch(_shrink, grid, arguments, (through_b, drops, places.even, rank, places.tile, ranks, inner), warps, stages)


def _launch_expand(h: torch.Tensor, places: Places, layer: int, width: int, through_a: bool) -> torch.Tensor:
    count, tokens, rank = h.shape
    table, drops = places.layers[layer], places.drops and through_a
    y = torch.empty(tokens, width, dtype=h.dtype, device=h.device)
    grid = (triton.cdiv(width, 128), len(places.tiles), 1)
    arguments = (y, h, table, places.parts, places.tiles, table.stride(0), width, tokens)
    constants = (through_a, drops, places.even, count, rank, places.tile, min(rank, 64), 128)
    launch(_expand, grid, arguments, constants, 8 if places.tile == 64 else 4, 2)
    return y


def _launch_collect(x: torch.Tensor, h: torch.Tensor, places: Places, layer: int, of_b: bool) -> None:
    count, tokens, rank = h.shape
    table, width, ranks = places.layers[layer], x.shape[1], min(rank, 64)
    grid = (count * (rank // ranks), triton.cdiv(width, 64), len(places.parts))
    arguments = (x, h, table, places.parts, table.stride(0), width, tokens)
    launch(_collect, grid, arguments, (of_b, places.drops and not of_b, places.even, rank, 64, ranks, 64))


@triton.jit
def _hash(x):
    """Mixes 32 bits (Wellons' lowbias32)."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _kept(part, table, tokens, columns):
    """Which elements dropout keeps: by the slot's key for this batch, the adapter, the slot's token and the column."""
    key, number = tl.load(part + 2), tl.load(table + 5)
    low, high = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
    row = _hash(tokens.to(tl.uint32) + _hash(low ^ _hash(high + number.to(tl.uint32))))
    # High bits of a product of two random odd numbers: a better hash would be most of what dropout costs.
    drawn = (_hash(columns.to(tl.uint32)) | 1)[None, :] * (row | 1)[:, None]
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
def _tile(tiles, parts, tables, stride):
    """This program's tokens: the first, and the rows of their slot in both tables."""
    tile = tiles + 2 * tl.program_id(1)
    number = tl.load(tile)
    return tl.load(tile + 1), parts + 4 * number, tables + number * stride


@triton.jit(do_not_specialize=["length"])  # or multiples of 16 would compile it anew
def _shrink(
    x, h, tables, parts, tiles, stride, width, length,
    THROUGH_B: tl.constexpr, DROPPED: tl.constexpr, EVEN: tl.constexpr, RANK: tl.constexpr,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    first, part, table = _tile(tiles, parts, tables, stride)
    layer = tl.program_id(0) // (RANK // RANKS)  # next to each other: what reads the same tokens
    table += 8 * layer
    rank = _rank(table, EVEN)
    if rank == 0:
        return
    start, stop = tl.load(part), tl.load(part + 1)
    tokens = first.to(tl.int64) + tl.arange(0, TOKENS)
    own = tokens < stop
    ranks = tl.program_id(0) % (RANK // RANKS) * RANKS + tl.arange(0, RANKS)
    total = tl.zeros((TOKENS, RANKS), dtype=tl.float32)
    weight = _matrix(table, 1, x.dtype.element_ty, EVEN) if THROUGH_B else _matrix(table, 0, x.dtype.element_ty, EVEN)
    for begin in range(0, width, INNER):
        inner = begin + tl.arange(0, INNER)
        there = inner < width
        values = tl.load(x + tokens[:, None] * width + inner[None, :], mask=own[:, None] & there[None, :], other=0.0)
        if DROPPED:
            values = tl.where(_kept(part, table, tokens - start, inner), values, tl.zeros_like(values))
        places = inner[:, None] * rank + ranks[None, :] if THROUGH_B else ranks[None, :] * width + inner[:, None]
        weights = tl.load(weight + places, mask=there[:, None] & (ranks < rank)[None, :], other=0.0)
        total = tl.dot(values, weights, total, input_precision="ieee")
    if THROUGH_B:
        total *= _scaling(part, table)
    at = h + (layer.to(tl.int64) * length + tokens[:, None]) * RANK + ranks[None, :]
    tl.store(at, total.to(h.dtype.element_ty), mask=own[:, None])


@triton.jit(do_not_specialize=["length"])  # or multiples of 16 would compile it anew
def _expand(
    y, h, tables, parts, tiles, stride, width, length,
    THROUGH_A: tl.constexpr, DROPPED: tl.constexpr, EVEN: tl.constexpr, LAYERS: tl.constexpr, RANK: tl.constexpr,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, OUTER: tl.constexpr,
):  # fmt: skip
    first, part, table = _tile(tiles, parts, tables, stride)
    start, stop = tl.load(part), tl.load(part + 1)
    tokens = first.to(tl.int64) + tl.arange(0, TOKENS)
    own = tokens < stop
    outer = tl.program_id(0) * OUTER + tl.arange(0, OUTER)
    there = outer < width
    result = tl.zeros((TOKENS, OUTER), dtype=tl.float32)
    for _ in tl.static_range(LAYERS):
        rank = _rank(table, EVEN)
        if rank > 0:
            total = tl.zeros((TOKENS, OUTER), dtype=tl.float32)
            weight = (
                _matrix(table, 0, y.dtype.element_ty, EVEN)
                if THROUGH_A
                else _matrix(table, 1, y.dtype.element_ty, EVEN)
            )
            for begin in tl.static_range(0, RANK, RANKS):
                ranks = begin + tl.arange(0, RANKS)
                here = own[:, None] & (ranks < rank)[None, :]
                low = tl.load(h + tokens[:, None] * RANK + ranks[None, :], mask=here, other=0.0)
                places = (
                    ranks[:, None] * width + outer[None, :] if THROUGH_A else outer[None, :] * rank + ranks[:, None]
                )
                weights = tl.load(weight + places, mask=(ranks < rank)[:, None] & there[None, :], other=0.0)
                total = tl.dot(low, weights, total, input_precision="ieee")
            if not THROUGH_A:
                total *= _scaling(part, table)
            if DROPPED:
                total = tl.where(_kept(part, table, tokens - start, outer), total, 0.0)
            result += total
        table += 8
        h += length.to(tl.int64) * RANK
    at = y + tokens[:, None] * width + outer[None, :]
    tl.store(at, result.to(y.dtype.element_ty), mask=own[:, None] & there[None, :])


@triton.jit(do_not_specialize=["length"])  # or multiples of 16 would compile it anew
def _collect(
    x, h, tables, parts, stride, width, length,
    OF_B: tl.constexpr, DROPPED: tl.constexpr, EVEN: tl.constexpr, RANK: tl.constexpr,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, OUTER: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(2)
    layer = tl.program_id(0) // (RANK // RANKS)  # next to each other: what reads the same tokens
    part, table = parts + 4 * number, tables + number * stride + 8 * layer
    rank = _rank(table, EVEN)
    if rank == 0:
        return
    start, stop = tl.load(part), tl.load(part + 1)
    outer = tl.program_id(1) * OUTER + tl.arange(0, OUTER)
    there = outer < width
    ranks = tl.program_id(0) % (RANK // RANKS) * RANKS + tl.arange(0, RANKS)
    h += layer.to(tl.int64) * length * RANK
    total = tl.zeros((OUTER, RANKS), dtype=tl.float32)
    for begin in range(start, stop, TOKENS):
        tokens = begin + tl.arange(0, TOKENS)
        own = tokens < stop
        values = tl.load(x + tokens[:, None] * width + outer[None, :], mask=own[:, None] & there[None, :], other=0.0)
        if DROPPED:
            values = tl.where(_kept(part, table, tokens - start, outer), values, tl.zeros_like(values))
        low = tl.load(h + tokens[:, None] * RANK + ranks[None, :], mask=own[:, None], other=0.0)
        total = tl.dot(tl.trans(values), low, total, input_precision="ieee")
    if OF_B:
        total *= _scaling(part, table)
        at = _matrix(table, 3, tl.float32, EVEN) + outer[:, None] * rank + ranks[None, :]
    else:
        at = _matrix(table, 2, tl.float32, EVEN) + ranks[None, :] * width + outer[:, None]
    tl.store(at, total, mask=there[:, None] & (ranks < rank)[None, :])
