"""The product of an activated gate and another tensor, as one Triton kernel, forward and backward.

SwiGLU and GeGLU (Shazeer, 2020) in feed-forward layers; with the sigmoid, the gate of an
attention's output (Qiu et al., 2025).
"""

from typing import Any

import torch
import triton
import triton.language as tl

from finetune.engine.packed.gpu.element_access import load_float32, store_rounded
from finetune.engine.packed.gpu.launch import launch

BLOCK = 1024
"""Most elements of one program."""

ACTIVATIONS = {
    "silu": 0,
    "swish": 0,
    "gelu_pytorch_tanh": 1,
    "sigmoid": 2,
}
"""The kernels' number of each activation, by transformers' name."""


def gated_product(
    gate: torch.Tensor, up: torch.Tensor, activation: str
) -> torch.Tensor:
    """activation(gate) · up, elementwise.

    Args:
        gate: [rows, columns]; its rows may lie apart in memory.
        up: As the gate.
        activation: One of `ACTIVATIONS`.

    Returns:
        [rows, columns].
    """
    output = gate.new_empty(gate.shape)
    arguments = (gate, up, output, gate.stride(0), up.stride(0), gate.shape[1])
    grid, constants = _shape(gate, activation)
    launch(_gated_product_kernel, grid, arguments, constants)
    return output


def gated_product_backward(
    grad_output: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    recompute_output: bool,
    grad_gate: torch.Tensor,
    grad_up: torch.Tensor,
) -> torch.Tensor | None:
    """Gradients of the inputs of `gated_product`.

    Args:
        grad_output: Overwritten by the output where that is recomputed.
        gate: As in the forward pass.
        up: As in the forward pass.
        activation: As in the forward pass.
        recompute_output: Compute the output again, so that it need not be kept in memory.
        grad_gate: Set to the gradient of the gate; it may be the gate.
        grad_up: Set to the gradient of `up`; it may be `up`.

    Returns:
        The output, in the memory of `grad_output`, or None.
    """
    arguments = (
        grad_output, gate, up, grad_gate, grad_up, gate.stride(0), up.stride(0),
        grad_gate.stride(0), grad_up.stride(0), gate.shape[1],
    )  # fmt: skip
    grid, constants = _shape(gate, activation)
    launch(
        _gated_product_backward_kernel, grid, arguments, (recompute_output, *constants)
    )
    return grad_output if recompute_output else None


def _shape(
    gate: torch.Tensor, activation: str
) -> tuple[tuple[int, int, int], tuple[Any, ...]]:
    """The kernels' grid, and their constants ACTIVATION and BLOCK."""
    rows, columns = gate.shape
    block = min(BLOCK, triton.next_power_of_2(columns))
    return (rows, triton.cdiv(columns, block), 1), (ACTIVATIONS[activation], block)


@triton.jit
def activate(g, ACTIVATION: tl.constexpr):
    """An activation and its derivative."""
    if ACTIVATION == 0:
        sigmoid = tl.sigmoid(g)
        value = g * sigmoid
        # silu(g) = g · sigmoid(g)
        derivative = sigmoid * (1 + g * (1 - sigmoid))
    elif ACTIVATION == 1:
        # gelu(g) = g · (1 + tanh(z)) / 2 = g · sigmoid(2 z), with z = √(2/π) · (g + 0.044715 g³).
        doubled = 1.5957691216057308 * (g + 0.044715 * g * g * g)
        slope = 1.5957691216057308 * (1 + 0.134145 * g * g)
        sigmoid = tl.sigmoid(doubled)
        value = g * sigmoid
        derivative = sigmoid + g * sigmoid * (1 - sigmoid) * slope
    else:
        value = tl.sigmoid(g)
        derivative = value * (1 - value)
    return value, derivative


@triton.jit
def _gated_product_kernel(
    gate, up, output, gate_stride, up_stride, columns,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Offsets may be too large for 32 bits.
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    g = load_float32(gate + row * gate_stride, column, mask)
    u = load_float32(up + row * up_stride, column, mask)
    activated, _ = activate(g, ACTIVATION)
    store_rounded(
        output + row * columns,
        column,
        activated * u,
        mask,
    )


@triton.jit
def _gated_product_backward_kernel(
    grad_output, gate, up, grad_gate, grad_up, gate_stride, up_stride, grad_gate_stride,
    grad_up_stride, columns,
    RECOMPUTE_OUTPUT: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    grad_first = grad_output + row * columns
    grad = load_float32(grad_first, column, mask)
    g = load_float32(gate + row * gate_stride, column, mask)
    u = load_float32(up + row * up_stride, column, mask)
    activated, derivative = activate(g, ACTIVATION)
    store_rounded(
        grad_gate + row * grad_gate_stride,
        column,
        grad * u * derivative,
        mask,
    )
    store_rounded(
        grad_up + row * grad_up_stride,
        column,
        grad * activated,
        mask,
    )
    if RECOMPUTE_OUTPUT:
        store_rounded(
            grad_first,
            column,
            activated * u,
            mask,
        )
