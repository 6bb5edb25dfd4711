"""RMS norm of each head and the rotary embedding of the result, as one Triton kernel.

By `rms_norm` and `rotary` the normalised heads would be written, read and written again. Their
backward passes stay: the rotation's is part of attention's.
"""

import torch
import triton
import triton.language as tl

from finetune.engine.packed.gpu.element_access import load_float32, store_rounded
from finetune.engine.packed.gpu.launch import launch
from finetune.engine.packed.gpu.rms_norm import (
    RmsNorm,
    divide_rows,
    load_rows,
    normalize,
)


def rotated_norm(
    x: torch.Tensor,
    norm: RmsNorm,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise each head, and rotate it as `rotary.apply_rotary` does.

    Args:
        x: [tokens · heads, head_dim], the heads of a token after each other; its rows may lie apart
            in memory.
        norm: The norm.
        cos: Of the angles [tokens, rotary_dim]; the second half of the columns repeats the first.
        sin: As cos.

    Returns:
        The rotated heads [tokens · heads, head_dim]; 1 / root mean square of each head, float32
        [tokens · heads].
    """
    rows, columns = x.shape
    tokens, rotary_dim = cos.shape
    assert rows % tokens == 0
    y = x.new_empty(x.shape)
    inverse_rms = torch.empty(rows, device=x.device)
    arguments = (
        x, norm.weight, cos, sin, y, inverse_rms, x.stride(0), rows, rows // tokens, columns,
        rotary_dim, norm.epsilon,
    )  # fmt: skip
    programs, rows_at_once, block, warps = divide_rows(rows, columns)
    constants = (norm.rounds_last, rows_at_once, block)
    launch(_rotated_norm_kernel, (programs, 1, 1), arguments, constants, warps)
    return y, inverse_rms


# Not specialised: numbers of rows that are multiples of 16 would be compiled separately.
@triton.jit(do_not_specialize=["row_count"])
def _rotated_norm_kernel(
    x, weight, cos, sin, y, inverse_rms, x_stride, row_count, heads, columns, rotary_dim, epsilon,
    ROUNDS_LAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, column, mask = load_rows(row_count, columns, ROWS, BLOCK)
    first = x + rows[:, None] * x_stride
    values = load_float32(first, column, mask)
    mean_square = tl.sum(values * values, 1) / columns
    scale = 1 / tl.sqrt(mean_square + epsilon)
    dtype = y.dtype.element_ty
    normalized = normalize(values, weight, column, columns, scale, dtype, ROUNDS_LAST)
    # The norm's result, which transformers' rotation takes.
    normalized = normalized.to(dtype).to(tl.float32)
    # The column with which each one is rotated; those behind the angles stay as they are.
    half = rotary_dim // 2
    partner = tl.where(column < half, column + half, column - half)
    is_rotated = column < rotary_dim
    partner = tl.where(is_rotated, partner, column)
    # From the cache, where the row has just been read to.
    others = load_float32(first, partner, mask)
    others = normalize(others, weight, partner, columns, scale, dtype, ROUNDS_LAST)
    others = others.to(dtype).to(tl.float32)
    angles = (rows // heads)[:, None] * rotary_dim + column
    c = load_float32(cos, angles, mask & is_rotated)
    s = load_float32(sin, angles, mask & is_rotated)
    s = tl.where(column < half, -s, s)
    rotated = tl.where(is_rotated, normalized * c + others * s, normalized)
    store_rounded(
        y,
        rows[:, None] * columns + column,
        rotated,
        mask,
    )
    tl.store(inverse_rms + rows, scale, mask=rows < row_count)
