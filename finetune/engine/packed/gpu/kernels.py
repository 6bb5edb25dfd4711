"""Triton kernels: on a GPU, one launch each for what PyTorch would do in many, every one over all of memory again.

Numbers are computed in float32 and rounded once, to the dtype of the tensor that they are put into.
"""

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 1024
"""Elements of one program where elements are independent."""


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
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, copies: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Root mean square normalisation of the rows of x [rows, width].

    Returns the normalised rows, the inverse roots, float32 [rows], and on demand a copy of x, for what is added to it.
    """
    rows, width = x.shape
    y, inverse = torch.empty_like(x), torch.empty(rows, device=x.device)
    copy = torch.empty_like(x) if copies else None
    arguments = (x, weight, y, inverse, y if copy is None else copy, width, epsilon)
    block, warps = _row(width)
    launch(_norm, (rows, 1, 1), arguments, (copies, block), warps)
    return y, inverse, copy


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


@triton.jit
def _norm(x, weight, y, inverse, copy, width, epsilon, COPIES: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    there = columns < width
    values = tl.load(x + row * width + columns, mask=there, other=0.0)
    if COPIES:
        tl.store(copy + row * width + columns, values, mask=there)
    exact = values.to(tl.float32)
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
