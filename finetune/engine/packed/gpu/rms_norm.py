"""RMS norm of each row as one Triton kernel, forward and backward.

One launch does what PyTorch does in several, each of which would read and write all of its
operands in memory (as in Liger Kernel, Hsu et al., 2024). So do `swiglu`, `rotary` and
`cross_entropy`. As an autograd function: `fused_layers`.
"""

import torch
import triton
import triton.language as tl

from finetune.engine.packed.gpu.element_access import load_float32, store_rounded
from finetune.engine.packed.gpu.launch import launch


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    copy_input: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Root mean square normalisation (Zhang and Sennrich, 2019) of each row.

    Args:
        x: [rows, columns].
        weight: [columns].
        epsilon: Added to the mean square.
        copy_input: Copy x on the way, for a residual that is added to in place.

    Returns:
        The normalised rows [rows, columns]; 1 / root mean square of each row, float32 [rows]; the
        copy of x or None.
    """
    rows, columns = x.shape
    y = torch.empty_like(x)
    inverse_rms = torch.empty(rows, device=x.device)
    residual = torch.empty_like(x) if copy_input else None
    # A kernel takes a tensor for each argument, used or not.
    residual_argument = y if residual is None else residual
    arguments = (x, weight, y, inverse_rms, residual_argument, columns, epsilon)
    block, warps = _row_block(columns)
    launch(
        _rms_norm_kernel,
        (rows, 1, 1),
        arguments,
        (copy_input, block),
        warps,
    )
    return y, inverse_rms, residual


def rms_norm_backward(
    grad_output: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    inverse_rms: torch.Tensor,
    grad_residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient of the input of `rms_norm`. The frozen weight gets none.

    Args:
        grad_output: [rows, columns].
        x: The input of the forward pass [rows, columns].
        weight: [columns].
        inverse_rms: From the forward pass [rows].
        grad_residual: Added to the result [rows, columns].

    Returns:
        [rows, columns].
    """
    rows, columns = x.shape
    grad_x = torch.empty_like(x)
    # A kernel takes a tensor for each argument, used or not.
    residual_argument = x if grad_residual is None else grad_residual
    arguments = (
        grad_output,
        x,
        weight,
        inverse_rms,
        residual_argument,
        grad_x,
        columns,
    )
    block, warps = _row_block(columns)
    constants = (grad_residual is not None, block)
    launch(
        _rms_norm_backward_kernel,
        (rows, 1, 1),
        arguments,
        constants,
        warps,
    )
    return grad_x


def _row_block(columns: int) -> tuple[int, int]:
    """Elements and warps of a program that takes a whole row."""
    # Whole, because a row's mean square is needed before any of its elements can be written.
    block = triton.next_power_of_2(columns)
    warps = min(max(block // 512, 1), 16)
    return block, warps


@triton.jit
def _rms_norm_kernel(
    x, weight, y, inverse_rms, residual, columns, epsilon,
    COPY_INPUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Offsets may be too large for 32 bits.
    row = tl.program_id(0).to(tl.int64)
    first = row * columns
    column = tl.arange(0, BLOCK)
    mask = column < columns
    values = tl.load(x + first + column, mask=mask, other=0.0)
    if COPY_INPUT:
        tl.store(residual + first + column, values, mask=mask)
    x_float32 = values.to(tl.float32)
    mean_square = tl.sum(x_float32 * x_float32, 0) / columns
    scale = 1 / tl.sqrt(mean_square + epsilon)
    # Rounded before it is multiplied by the weight, as in transformers.
    normalized = (x_float32 * scale).to(y.dtype.element_ty).to(tl.float32)
    weights = load_float32(weight, column, mask)
    store_rounded(
        y + first,
        column,
        normalized * weights,
        mask,
    )
    tl.store(inverse_rms + row, scale)


@triton.jit
def _rms_norm_backward_kernel(
    grad_output, x, weight, inverse_rms, grad_residual, grad_x, columns,
    ADD_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = row * columns
    column = tl.arange(0, BLOCK)
    mask = column < columns
    scale = tl.load(inverse_rms + row)
    normalized = load_float32(x + first, column, mask) * scale
    grad_normalized = load_float32(grad_output + first, column, mask)
    grad_normalized *= load_float32(weight, column, mask)
    # A longer or shorter row has the same norm: the gradient has no component along the row.
    projection = tl.sum(grad_normalized * normalized, 0) / columns
    result = (grad_normalized - normalized * projection) * scale
    if ADD_RESIDUAL:
        result += load_float32(grad_residual + first, column, mask)
    store_rounded(
        grad_x + first,
        column,
        result,
        mask,
    )
