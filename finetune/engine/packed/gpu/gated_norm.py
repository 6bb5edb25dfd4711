"""The RMS norm of each head times its activated gate, as one Triton kernel each way (Qwen 3.5)."""

import torch
import triton
import triton.language as tl

from finetune.engine.packed.gpu.element_access import load_float32, store_rounded
from finetune.engine.packed.gpu.launch import launch
from finetune.engine.packed.gpu.rms_norm import RmsNorm

ELEMENTS = 2048
"""Elements of one program, where rows are shorter."""
WARPS = 4
"""Warps of one program: the fastest on an H200, as `ELEMENTS`."""


def gated_norm(x: torch.Tensor, gate: torch.Tensor, norm: RmsNorm) -> torch.Tensor:
    """Compute norm(x) · silu(gate).

    Args:
        x: [rows, columns], contiguous.
        gate: As x.
        norm: The norm, which rounds before it multiplies by its weight.

    Returns:
        [rows, columns].
    """
    output = torch.empty_like(x)
    tensors = (x, gate, norm.weight, output)
    _launch(_gated_norm_kernel, tensors, norm, ())
    return output


def gated_norm_backward(
    grad_output: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    norm: RmsNorm,
    recompute_output: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of the inputs of `gated_norm`. The frozen weight gets none.

    Args:
        grad_output: As x; overwritten by the output where that is recomputed.
        x: As in the forward pass.
        gate: As in the forward pass; overwritten by its gradient.
        norm: As in the forward pass.
        recompute_output: Compute the output again, so that it need not be kept in memory.

    Returns:
        The gradient of x, and the output or None.
    """
    grad_x = torch.empty_like(x)
    tensors = (grad_output, x, gate, norm.weight, grad_x)
    _launch(_gated_norm_backward_kernel, tensors, norm, (recompute_output,))
    return grad_x, grad_output if recompute_output else None


def _launch(
    kernel: object,
    tensors: tuple[torch.Tensor, ...],
    norm: RmsNorm,
    constants: tuple[bool, ...],
) -> None:
    rows, columns = tensors[0].shape
    block = triton.next_power_of_2(columns)
    rows_at_once = max(ELEMENTS // block, 1)
    grid = (triton.cdiv(rows, rows_at_once), 1, 1)
    arguments = (*tensors, rows, columns, norm.epsilon)
    launch(kernel, grid, arguments, (*constants, rows_at_once, block), WARPS)


@triton.jit
def _cells(row_count, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets of this program's elements, and which exist, and its columns."""
    # Offsets may be too large for 32 bits.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (rows < row_count)[:, None] & (column < columns)[None, :]
    return rows[:, None] * columns + column[None, :], mask, column


@triton.jit
def _normalize(x, epsilon, columns):
    """Rows with the root mean square 1, and their factors."""
    scale = 1 / tl.sqrt(tl.sum(x * x, 1) / columns + epsilon)
    return x * scale[:, None], scale


# Not specialised: numbers of rows that are multiples of 16 would be compiled separately.
@triton.jit(do_not_specialize=["row_count"])
def _gated_norm_kernel(
    x, gate, weight, output, row_count, columns, epsilon,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    cells, mask, column = _cells(row_count, columns, ROWS, BLOCK)
    normalized, _ = _normalize(load_float32(x, cells, mask), epsilon, columns)
    # As the base's own code in transformers does.
    dtype = output.dtype.element_ty
    normalized = normalized.to(dtype).to(tl.float32)
    normalized *= load_float32(weight, column, column < columns)[None, :]
    normalized = normalized.to(dtype).to(tl.float32)
    g = load_float32(gate, cells, mask)
    store_rounded(
        output,
        cells,
        normalized * g * tl.sigmoid(g),
        mask,
    )


@triton.jit(do_not_specialize=["row_count"])
def _gated_norm_backward_kernel(
    grad_output, x, gate, weight, grad_x, row_count, columns, epsilon,
    RECOMPUTE_OUTPUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    cells, mask, column = _cells(row_count, columns, ROWS, BLOCK)
    normalized, scale = _normalize(load_float32(x, cells, mask), epsilon, columns)
    factors = load_float32(weight, column, column < columns)[None, :]
    dtype = grad_x.dtype.element_ty
    rounded = normalized.to(dtype).to(tl.float32) * factors
    rounded = rounded.to(dtype).to(tl.float32)
    g = load_float32(gate, cells, mask)
    sigmoid = tl.sigmoid(g)
    activated = g * sigmoid
    grads = load_float32(grad_output, cells, mask)
    # silu(g) = g · sigmoid(g)
    store_rounded(
        gate,
        cells,
        grads * rounded * sigmoid * (1 + g * (1 - sigmoid)),
        mask,
    )
    if RECOMPUTE_OUTPUT:
        store_rounded(
            grad_output,
            cells,
            activated * rounded,
            mask,
        )
    grads *= activated * factors
    # A longer or shorter row has the same norm: the gradient has no component along the row.
    along = tl.sum(grads * normalized, 1)[:, None] / columns
    store_rounded(
        grad_x,
        cells,
        (grads - normalized * along) * scale[:, None],
        mask,
    )
