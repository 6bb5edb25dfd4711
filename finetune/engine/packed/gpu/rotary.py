"""The rotary position embedding (Su et al., 2021) as one Triton kernel."""

import torch
import triton
import triton.language as tl

from finetune.engine.packed.gpu.element_access import load_float32, store_rounded
from finetune.engine.packed.gpu.launch import launch

HEADS = 16
"""Heads of one program."""


def apply_rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    sign: float,
) -> None:
    """Rotate each pair of columns i and i + rotary_dim / 2 by an angle, in place.

    Columns from rotary_dim on stay as they are (partial rotary embedding).

    Args:
        x: [tokens, heads, head_dim]; its tokens may lie apart in memory.
        cos: Of the angles [tokens, rotary_dim]; the second half of the columns repeats the first.
        sin: As cos.
        sign: 1.0 rotates; -1.0 rotates back, which is also the gradient.
    """
    tokens, heads, head_dim = x.shape
    rotary_dim = cos.shape[1]
    # Triton's blocks are powers of 2; the kernel masks what is too much.
    block = triton.next_power_of_2(rotary_dim // 2)
    arguments = (x, cos, sin, x.stride(0), heads, head_dim, rotary_dim, sign)
    grid = (tokens, triton.cdiv(heads, HEADS), 1)
    launch(
        _rotary_kernel,
        grid,
        arguments,
        (HEADS, block),
    )


@triton.jit
def _rotary_kernel(
    x,
    cos,
    sin,
    x_stride,
    heads,
    head_dim,
    rotary_dim,
    sign,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Offsets may be too large for 32 bits.
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half = rotary_dim // 2
    column = tl.arange(0, BLOCK)
    column_mask = column < half
    # Loaded once for all heads of the program: they have the token's angles in common.
    first_angle = token * rotary_dim
    c = load_float32(cos + first_angle, column, column_mask)[None, :]
    s = load_float32(sin + first_angle, column, column_mask)[None, :] * sign
    offsets = token * x_stride + head[:, None] * head_dim + column[None, :]
    mask = (head < heads)[:, None] & column_mask[None, :]
    first = load_float32(x, offsets, mask)
    second = load_float32(x + half, offsets, mask)
    store_rounded(
        x,
        offsets,
        first * c - second * s,
        mask,
    )
    store_rounded(
        x + half,
        offsets,
        second * c + first * s,
        mask,
    )
