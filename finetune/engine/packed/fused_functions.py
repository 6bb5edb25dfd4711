"""RMS norm and gated activations as one autograd function each, for frozen weights.

Each keeps only what the gradient of its input needs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import gelu, silu


class _RMSNorm(torch.autograd.Function):
    """Root mean square normalisation (Zhang and Sennrich, 2019), computed in float32.

    Keeps its input and one number a token.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        epsilon: float,
        rounds_last: bool,
    ) -> torch.Tensor:
        x_float32 = x.float()
        mean_square = (x_float32 * x_float32).mean(-1, keepdim=True)
        inverse_rms = torch.rsqrt(mean_square + epsilon)
        ctx.save_for_backward(x, weight, inverse_rms)
        normalized = x_float32 * inverse_rms
        if rounds_last:
            return (weight * normalized).to(x.dtype)
        return weight * normalized.to(x.dtype)

    @staticmethod
    def backward(
        ctx: Any, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        x, weight, inverse_rms = ctx.saved_tensors
        (grad_output,) = grad_outputs
        grad_normalized = (grad_output * weight).float()
        # Computed again instead of kept: it is as large as the input.
        normalized = x.float() * inverse_rms
        # A longer or shorter row has the same norm: the gradient has no component along the row.
        projection = (grad_normalized * normalized).mean(-1, keepdim=True)
        # (grad_normalized - normalized · projection) · inverse_rms, in place to save memory.
        parallel = normalized.mul_(projection)
        grad_x = grad_normalized.sub_(parallel).mul_(inverse_rms)
        return grad_x.to(x.dtype), None, None, None


class _SiLU:
    """The activation of SwiGLU (Shazeer, 2020)."""

    @staticmethod
    def value(x: torch.Tensor) -> torch.Tensor:
        return silu(x)

    @staticmethod
    def backward(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.aten.silu_backward(gradient, x)
        return result


class _GELU:
    """The activation of GeGLU (Shazeer, 2020), in its approximation by tanh (Gemma)."""

    @staticmethod
    def value(x: torch.Tensor) -> torch.Tensor:
        return gelu(x, approximate="tanh")

    @staticmethod
    def backward(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.aten.gelu_backward(
            gradient, x, approximate="tanh"
        )
        return result


class _GatedProduct(torch.autograd.Function):
    """activation(gate) · up; keeps its two inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: torch.Tensor,
        up: torch.Tensor,
        activation: type[_SiLU] | type[_GELU],
    ) -> torch.Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        # In place on the activation's output, which nothing else refers to.
        return activation.value(gate).mul_(up)

    @staticmethod
    def backward(
        ctx: Any, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        gate, up = ctx.saved_tensors
        (grad_output,) = grad_outputs
        grad_gate = ctx.activation.backward(grad_output * up, gate)
        grad_up = ctx.activation.value(gate).mul_(grad_output)
        return grad_gate, grad_up, None


rms_norm: Callable[..., torch.Tensor] = _RMSNorm.apply


_gated_product: Callable[..., torch.Tensor] = _GatedProduct.apply


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Compute silu(gate) · up."""
    return _gated_product(gate, up, _SiLU)


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Compute gelu(gate) · up."""
    return _gated_product(gate, up, _GELU)
