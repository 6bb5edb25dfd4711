"""RMS norm and SwiGLU as one autograd function each, for the layers of a frozen base.

Transformers writes them as five to ten operations, each of which keeps its input for the backward
pass. Here one operation keeps only what the gradient of its input needs; frozen weights get none.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import silu
from transformers.activations import ACT2FN


def fuse_layers(base: torch.nn.Module, active: Callable[[], bool]) -> None:
    """Replace the forward methods of the base's RMS norms and gated feed-forward layers.

    Args:
        base: The base, changed in place.
        active: Asked at each call: True for the fused layer, False for the original one.
    """
    for module in base.modules():
        if _is_rms_norm(module):
            _replace_forward(module, _fused_rms_norm(module), active)
        elif _is_swiglu(module):
            _replace_forward(module, _fused_swiglu(module), active)


def _is_rms_norm(module: torch.nn.Module) -> bool:
    # Each architecture has a class of its own, and some name their epsilon otherwise.
    has_name = type(module).__name__.endswith("RMSNorm")
    return has_name and hasattr(module, "variance_epsilon")


def _is_swiglu(module: torch.nn.Module) -> bool:
    transformers_silu = type(ACT2FN["silu"])
    activation = getattr(module, "act_fn", None)
    if not isinstance(activation, torch.nn.SiLU | transformers_silu):
        return False
    projections = ("gate_proj", "up_proj", "down_proj")
    return all(hasattr(module, name) for name in projections)


def _replace_forward(
    module: torch.nn.Module,
    fused: Callable[[torch.Tensor], torch.Tensor],
    active: Callable[[], bool],
) -> None:
    original = module.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        if active():
            return fused(x)
        output: torch.Tensor = original(x)
        return output

    # Of this instance only: other models of the process share its class.
    module.forward = forward


def _fused_rms_norm(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, module.weight, module.variance_epsilon)

    return forward


def _fused_swiglu(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        # No name is bound to the product, so that it can be freed as soon as nothing needs it.
        output: torch.Tensor = module.down_proj(
            swiglu(module.gate_proj(x), module.up_proj(x))
        )
        return output

    return forward


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
    ) -> torch.Tensor:
        x_float32 = x.float()
        mean_square = (x_float32 * x_float32).mean(-1, keepdim=True)
        inverse_rms = torch.rsqrt(mean_square + epsilon)
        ctx.save_for_backward(x, weight, inverse_rms)
        # Rounded before it is multiplied by the weight, as in transformers.
        normalized = (x_float32 * inverse_rms).to(x.dtype)
        return weight * normalized

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
        return grad_x.to(x.dtype), None, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) · up (SwiGLU: Shazeer, 2020); keeps its two inputs."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        # In place on silu's output, which nothing else refers to.
        return silu(gate).mul_(up)

    @staticmethod
    def backward(
        ctx: Any, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        (grad_output,) = grad_outputs
        grad_gate = torch.ops.aten.silu_backward(grad_output * up, gate)
        grad_up = silu(gate).mul_(grad_output)
        return grad_gate, grad_up


rms_norm: Callable[..., torch.Tensor] = _RMSNorm.apply


swiglu: Callable[..., torch.Tensor] = _SwiGLU.apply
