"""SwiGLU (Shazeer, 2020) as one Triton kernel, forward and backward."""

import torch
import triton
import triton.language as tl

from finetune.engine.packed.gpu.element_access import load_float32, store_rounded
from finetune.engine.packed.gpu.launch import launch

BLOCK = 1024
"""Elements of one program."""


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up, elementwise.

    Args:
        gate: [tokens, intermediate_size].
        up: As the gate.

    Returns:
        [tokens, intermediate_size].
    """
    output = torch.empty_like(gate)
    count = gate.numel()
    grid = (triton.cdiv(count, BLOCK), 1, 1)
    launch(
        _swiglu_kernel,
        grid,
        (gate, up, output, count),
        (BLOCK,),
    )
    return output


def swiglu_backward(
    grad_output: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    recompute_output: bool,
) -> torch.Tensor | None:
    """Gradients of the inputs of `swiglu`, in place.

    Args:
        grad_output: Overwritten by the output where that is recomputed.
        gate: Overwritten by its gradient.
        up: Overwritten by its gradient.
        recompute_output: Compute the output again, so that it need not be kept in memory.

    Returns:
        The output, in the memory of `grad_output`, or None.
    """
    count = gate.numel()
    grid = (triton.cdiv(count, BLOCK), 1, 1)
    arguments = (grad_output, gate, up, count)
    launch(
        _swiglu_backward_kernel,
        grid,
        arguments,
        (recompute_output, BLOCK),
    )
    return grad_output if recompute_output else None


@triton.jit
def _swiglu_kernel(
    gate,
    up,
    output,
    count,
    BLOCK: tl.constexpr,
):
    # Offsets may be too large for 32 bits.
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = first + tl.arange(0, BLOCK)
    mask = offsets < count
    g = load_float32(gate, offsets, mask)
    u = load_float32(up, offsets, mask)
    store_rounded(
        output,
        offsets,
        g * tl.sigmoid(g) * u,
        mask,
    )


@triton.jit
def _swiglu_backward_kernel(
    grad_output,
    gate,
    up,
    count,
    RECOMPUTE_OUTPUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = first + tl.arange(0, BLOCK)
    mask = offsets < count
    grad = load_float32(grad_output, offsets, mask)
    g = load_float32(gate, offsets, mask)
    u = load_float32(up, offsets, mask)
    sigmoid = tl.sigmoid(g)
    # silu(g) = g · sigmoid(g) has the derivative sigmoid(g) · (1 + g · (1 - sigmoid(g))).
    grad_gate = grad * u * sigmoid * (1 + g * (1 - sigmoid))
    grad_up = grad * g * sigmoid
    store_rounded(gate, offsets, grad_gate, mask)
    store_rounded(up, offsets, grad_up, mask)
    if RECOMPUTE_OUTPUT:
        store_rounded(
            grad_output,
            offsets,
            g * sigmoid * u,
            mask,
        )
