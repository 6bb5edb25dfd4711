"""RMS norm of each row as one Triton kernel, forward and backward.

One launch does what PyTorch does in several, each of which would read and write all of its
operands in memory (as in Liger Kernel, Hsu et al., 2024). So do `gated_product`, `rotary` and
`cross_entropy`. As an autograd function: `fused_layers`.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from finetune.engine.packed.gpu.element_access import load_float32, store_rounded
from finetune.engine.packed.gpu.launch import launch
from finetune.model.decoder_blocks import DecoderBlock


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
        x, norm.weight, y, inverse_rms, residual, x.stride(0), columns, norm.epsilon,
    )  # fmt: skip
    block, warps = _row_block(columns)
    constants = (copy_input, add_residual, norm.rounds_last, block)
    launch(_rms_norm_kernel, (rows, 1, 1), arguments, constants, warps)
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
        x.stride(0), grad_x.stride(0), columns,
    )  # fmt: skip
    block, warps = _row_block(columns)
    constants = (grad_residual is not None, block)
    launch(_rms_norm_backward_kernel, (rows, 1, 1), arguments, constants, warps)
    return grad_x


def _row_block(columns: int) -> tuple[int, int]:
    """Elements and warps of a program that takes a whole row."""
    # Whole, because a row's mean square is needed before any of its elements can be written.
    block = triton.next_power_of_2(columns)
    warps = min(max(block // 512, 1), 16)
    return block, warps


@triton.jit
def _rms_norm_kernel(
    x, weight, y, inverse_rms, residual, x_stride, columns, epsilon,
    COPY_INPUT: tl.constexpr, ADD_RESIDUAL: tl.constexpr, ROUNDS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # Offsets may be too large for 32 bits.
    row = tl.program_id(0).to(tl.int64)
    first = row * columns
    column = tl.arange(0, BLOCK)
    mask = column < columns
    values = tl.load(x + row * x_stride + column, mask=mask, other=0.0)
    if COPY_INPUT:
        tl.store(residual + first + column, values, mask=mask)
    x_float32 = values.to(tl.float32)
    mean_square = tl.sum(x_float32 * x_float32, 0) / columns
    scale = 1 / tl.sqrt(mean_square + epsilon)
    normalized = x_float32 * scale
    # As the base's own code in transformers does.
    if not ROUNDS_LAST:
        normalized = normalized.to(y.dtype.element_ty).to(tl.float32)
    result = normalized * load_float32(weight, column, mask)
    if ADD_RESIDUAL:
        # Rounded first, as in transformers, where the sum is an operation of its own.
        result = result.to(y.dtype.element_ty).to(tl.float32)
        result += load_float32(residual + first, column, mask)
    store_rounded(
        y + first,
        column,
        result,
        mask,
    )
    tl.store(inverse_rms + row, scale)


@triton.jit
def _rms_norm_backward_kernel(
    grad_output, x, weight, inverse_rms, grad_residual, grad_x, x_stride, grad_x_stride, columns,
    ADD_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = row * columns
    column = tl.arange(0, BLOCK)
    mask = column < columns
    scale = tl.load(inverse_rms + row)
    normalized = load_float32(x + row * x_stride, column, mask) * scale
    grad_normalized = load_float32(grad_output + first, column, mask)
    grad_normalized *= load_float32(weight, column, mask)
    # A longer or shorter row has the same norm: the gradient has no component along the row.
    projection = tl.sum(grad_normalized * normalized, 0) / columns
    result = (grad_normalized - normalized * projection) * scale
    if ADD_RESIDUAL:
        result += load_float32(grad_residual + first, column, mask)
    store_rounded(
        grad_x + row * grad_x_stride,
        column,
        result,
        mask,
    )
