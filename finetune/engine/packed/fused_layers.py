"""Layers of a frozen base that keep less for the backward pass: nobody reads the gradient of their weights.

What transformers writes as five to ten operations, each of which keeps its input, is one here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import silu


def fuse_layers(base: torch.nn.Module, active: Callable[[], bool]) -> None:
    """Let the base's RMS norms and gated feed-forward layers work leanly while `active()`, else as they are."""
    for module in base.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            _replace(module, _lean_norm(module), active)
        elif isinstance(getattr(module, "act_fn", None), torch.nn.SiLU | _transformers_silu()) and all(
            hasattr(module, f"{name}_proj") for name in ("gate", "up", "down")
        ):
            _replace(module, _lean_gate(module), active)


def _transformers_silu() -> type:
    from transformers.activations import ACT2FN

    return type(ACT2FN["silu"])


def _replace(module: torch.nn.Module, lean: Callable[[torch.Tensor], torch.Tensor], active: Callable[[], bool]) -> None:
    plain = module.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = lean(x) if active() else plain(x)
        return result

    module.forward = forward


def _lean_norm(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: norm(x, module.weight, module.variance_epsilon)


def _lean_gate(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: module.down_proj(gate(module.gate_proj(x), module.up_proj(x)))


class _Norm(torch.autograd.Function):
    """Root mean square normalisation (Zhang and Sennrich, 2019) in float32; keeps its input and a number a token."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        exact = x.float()
        inverse = torch.rsqrt((exact * exact).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return weight * (exact * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        slope = (gradients[0] * weight).float()
        unit = x.float() * inverse
        shared = (slope * unit).mean(-1, keepdim=True)
        return (slope.sub_(unit.mul_(shared)).mul_(inverse)).to(x.dtype), None, None


class _Gate(torch.autograd.Function):
    """silu(gate) · up (SwiGLU: Shazeer, 2020); keeps its two inputs."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        into_gate = torch.ops.aten.silu_backward(gradients[0] * up, gate)
        return into_gate, silu(gate).mul_(gradients[0])


norm: Callable[..., torch.Tensor] = _Norm.apply


gate: Callable[..., torch.Tensor] = _Gate.apply
