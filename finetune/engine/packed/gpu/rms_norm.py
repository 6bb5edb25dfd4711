"""RMS norm of each row as one Triton kernel, forward and backward.

One launch does what PyTorch does in several, each of which would read and write all of its
operands in memory (as in Liger Kernel, Hsu et al., 2024). So do `gated_product`, `rotary`,
`rotated_norm` and `cross_entropy`. As an autograd function: `fused_layers`.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from finetune.engine.packed.gpu.element_access import load_float32, store_rounded
from finetune.engine.packed.gpu.launch import launch
from finetune.model.decoder_blocks import DecoderBlock

ELEMENTS = 2048
"""Elements of the rows that a program takes at once, where rows are shorter."""


@dataclass(frozen=True)
class RmsNorm:
    """A frozen norm: root mean square normalisation (Zhang and Sennrich, 2019) and a weight."""

    weight: torch.Tensor
    """[columns]"""
    epsilon: float
    """Added to the mean square."""
    rounds_last: bool
    """Whether the result is rounded to 16 bits after it is multiplied by the weight, instead of
    before."""


def read_norm(module: Any, block: DecoderBlock) -> RmsNorm:
    """Read transformers' module of a norm.

    Args:
        module: The norm.
        block: What the base's blocks are made of.
    """
    epsilon = getattr(module, "variance_epsilon", None)
    if epsilon is None:
        epsilon = module.eps
    weight = module.weight.detach()
    if block.norm_offset:
        # A frozen weight, so it is computed once.
        weight = block.norm_offset + weight.float()
    return RmsNorm(weight, epsilon, block.norm_rounds_last)


def rms_norm(
    x: torch.Tensor,
    norm: RmsNorm,
    copy_input: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Normalise each row.

    Args:
        x: [rows, columns]; its rows may lie apart in memory.
        norm: The norm.
        copy_input: Copy x on the way, for a residual that is added to in place.

    Returns:
        The normalised rows [rows, columns]; 1 / root mean square of each row, float32 [rows]; the
        copy of x or None.
    """
    y = x.new_empty(x.shape)
    residual = x.new_empty(x.shape) if copy_input else None
    # A kernel takes a tensor for each argument, used or not.
    residual_argument = y if residual is None else residual
    inverse_rms = _launch_forward(x, norm, y, residual_argument, copy_input, False)
    return y, inverse_rms, residual


def add_rms_norm(
    residual: torch.Tensor, x: torch.Tensor, norm: RmsNorm
) -> torch.Tensor:
    """Add the normalised rows of x to a residual, in place.

    Args:
        residual: [rows, columns]; becomes residual + norm(x).
        x: [rows, columns].
        norm: The norm.

    Returns:
        1 / root mean square of each row of x, float32 [rows].
    """
    return _launch_forward(x, norm, residual, residual, False, True)


def _launch_forward(
    x: torch.Tensor,
    norm: RmsNorm,
    y: torch.Tensor,
    residual: torch.Tensor,
    copy_input: bool,
    add_residual: bool,
) -> torch.Tensor:
    rows, columns = x.shape
    inverse_rms = torch.empty(rows, device=x.device)
    arguments = (
        x, norm.weight, y, inverse_rms, residual, x.stride(0), rows, columns, norm.epsilon,
    )  # fmt: skip
    programs, rows_at_once, block, warps = divide_rows(rows, columns)
    constants = (copy_input, add_residual, norm.rounds_last, rows_at_once, block)
    launch(_rms_norm_kernel, (programs, 1, 1), arguments, constants, warps)
    return inverse_rms


def rms_norm_backward(
    grad_output: torch.Tensor,
    x: torch.Tensor,
    norm: RmsNorm,
    inverse_rms: torch.Tensor,
    grad_residual: torch.Tensor | None = None,
    grad_x: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient of the input of `rms_norm` or `add_rms_norm`. The frozen weight gets none.

    Args:
        grad_output: [rows, columns].
        x: The input of the forward pass [rows, columns].
        norm: The norm.
        inverse_rms: From the forward pass [rows].
        grad_residual: Added to the result [rows, columns].
        grad_x: Where the result goes; its rows may lie apart in memory. None: into new memory.

    Returns:
        [rows, columns].
    """
    rows, columns = x.shape
    if grad_x is None:
        grad_x = x.new_empty(x.shape)
    # A kernel takes a tensor for each argument, used or not.
    residual_argument = x if grad_residual is None else grad_residual
    arguments = (
        grad_output, x, norm.weight, inverse_rms, residual_argument, grad_x,
        x.stride(0), grad_x.stride(0), rows, columns,
    )  # fmt: skip
    programs, rows_at_once, block, warps = divide_rows(rows, columns)
    constants = (grad_residual is not None, rows_at_once, block)
    launch(_rms_norm_backward_kernel, (programs, 1, 1), arguments, constants, warps)
    return grad_x


def divide_rows(rows: int, columns: int) -> tuple[int, int, int, int]:
    """Programs, rows of a program, elements of a row, and warps of a program."""
    # Whole rows, because a row's mean square is needed before its elements can be written.
    block = triton.next_power_of_2(columns)
    # Heads are short: a program for each would be more launch than work.
    rows_at_once = max(ELEMENTS // block, 1)
    warps = min(max(rows_at_once * block // 512, 1), 16)
    return triton.cdiv(rows, rows_at_once), rows_at_once, block, warps


# Not specialised: numbers of rows that are multiples of 16 would be compiled separately.
@triton.jit(do_not_specialize=["row_count"])
def _rms_norm_kernel(
    x, weight, y, inverse_rms, residual, x_stride, row_count, columns, epsilon,
    COPY_INPUT: tl.constexpr, ADD_RESIDUAL: tl.constexpr, ROUNDS_LAST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, column, mask = load_rows(row_count, columns, ROWS, BLOCK)
    offsets = rows[:, None] * columns + column
    values = tl.load(x + rows[:, None] * x_stride + column, mask=mask, other=0.0)
    if COPY_INPUT:
        tl.store(residual + offsets, values, mask=mask)
    x_float32 = values.to(tl.float32)
    mean_square = tl.sum(x_float32 * x_float32, 1) / columns
    scale = 1 / tl.sqrt(mean_square + epsilon)
    dtype = y.dtype.element_ty
    result = normalize(x_float32, weight, column, columns, scale, dtype, ROUNDS_LAST)
    if ADD_RESIDUAL:
        # Rounded first, as in transformers, where the sum is an operation of its own.
        result = result.to(y.dtype.element_ty).to(tl.float32)
        result += load_float32(residual, offsets, mask)
    store_rounded(
        y,
        offsets,
        result,
        mask,
    )
    tl.store(inverse_rms + rows, scale, mask=rows < row_count)


@triton.jit
def normalize(
    values, weight, column, columns, scale, dtype: tl.constexpr, ROUNDS_LAST: tl.constexpr
):  # fmt: skip
    """The norm of values [ROWS, columns], which are not rounded to the dtype at last."""
    normalized = values * scale[:, None]
    # As the base's own code in transformers does.
    if not ROUNDS_LAST:
        normalized = normalized.to(dtype).to(tl.float32)
    return normalized * load_float32(weight, column, column < columns)


@triton.jit
def load_rows(row_count, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's rows [ROWS] and columns [1, BLOCK], and which of their elements exist."""
    # Offsets may be too large for 32 bits.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    return rows, column, (rows < row_count)[:, None] & (column < columns)


@triton.jit(do_not_specialize=["row_count"])
def _rms_norm_backward_kernel(
    grad_output, x, weight, inverse_rms, grad_residual, grad_x, x_stride, grad_x_stride, row_count,
    columns,
    ADD_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, column, mask = load_rows(row_count, columns, ROWS, BLOCK)
    offsets = rows[:, None] * columns + column
    scale = load_float32(inverse_rms, rows, rows < row_count)[:, None]
    normalized = load_float32(x, rows[:, None] * x_stride + column, mask) * scale
    grad_normalized = load_float32(grad_output, offsets, mask)
    grad_normalized *= load_float32(weight, column, column < columns)
    # A longer or shorter row has the same norm: the gradient has no component along the row.
    projection = tl.sum(grad_normalized * normalized, 1)[:, None] / columns
    result = (grad_normalized - normalized * projection) * scale
    if ADD_RESIDUAL:
        result += load_float32(grad_residual, offsets, mask)
    store_rounded(
        grad_x,
        rows[:, None] * grad_x_stride + column,
        result,
        mask,
    )
