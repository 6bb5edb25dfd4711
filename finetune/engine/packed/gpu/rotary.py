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
) -> torch.Tensor:
    """Rotate each pair of columns i and i + head_dim / 2 by an angle.

    Args:
        x: [tokens, heads, head_dim].
        cos: Of the angles [tokens, head_dim]; the second half of the columns repeats the first.
        sin: As cos.
        sign: 1.0 rotates; -1.0 rotates back, which is also the gradient.

    Returns:
        [tokens, heads, head_dim].
    """
    tokens, heads, head_dim = x.shape
    output = torch.empty_like(x)
    # Triton's blocks are powers of 2; the kernel masks what is too much.
    block = triton.next_power_of_2(head_dim // 2)
    arguments = (x, cos, sin, output, heads, head_dim, sign)
    grid = (tokens, triton.cdiv(heads, HEADS), 1)
    launch(
        _rotary_kernel,
        grid,
        arguments,
        (HEADS, block),
    )
    return output


@triton.jit
def _rotary_kernel(
    x,
    cos,
    sin,
    output,
    heads,
    head_dim,
    sign,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Offsets may be too large for 32 bits.
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half = head_dim // 2
    column = tl.arange(0, BLOCK)
    column_mask = column < half
    # Loaded once for all heads of the program: they have the token's angles in common.
    first_angle = token * head_dim
    c = load_float32(cos + first_angle, column, column_mask)[None, :]
    s = load_float32(sin + first_angle, column, column_mask)[None, :] * sign
    offsets = token * heads * head_dim + head[:, None] * head_dim + column[None, :]
    mask = (head < heads)[:, None] & column_mask[None, :]
    first = load_float32(x, offsets, mask)
    second = load_float32(x + half, offsets, mask)
    store_rounded(
        output,
        offsets,
        first * c - second * s,
        mask,
    )
    store_rounded(
        output + half,
        offsets,
        second * c + first * s,
        mask,
    )
