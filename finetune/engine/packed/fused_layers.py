"""RMS norms and gated feed-forward layers as one autograd function each, for a frozen base.

Transformers writes them as five to ten operations, each of which keeps its input for the backward
pass. Here one operation keeps only what the gradient of its input needs; frozen weights get none.

Architectures write the same layer in several ways (a norm multiplies by w or 1 + w, before or after
it is rounded). A layer is replaced only by a form that gives its own results.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.activations import ACT2FN

from finetune.engine.packed.fused_functions import geglu, rms_norm, swiglu

Forward = Callable[[torch.Tensor], torch.Tensor]

COMPARED_TOKENS = 2
"""Tokens of the random input on which a form is compared with a layer's own code."""


def fuse_layers(base: torch.nn.Module, active: Callable[[], bool]) -> None:
    """Replace the forward methods of the base's RMS norms and gated feed-forward layers.

    Args:
        base: The base, changed in place.
        active: Asked at each call: True for the fused layer, False for the original one.
    """
    forms: dict[type, Callable[[Any], Forward] | None] = {}
    """The form of each class of layers; None: no form gives the layer's results."""
    for module in base.modules():
        candidates = _candidates(module)
        if not candidates:
            continue
        kind = type(module)
        if kind not in forms:
            forms[kind] = _equal_form(module, candidates)
        form = forms[kind]
        if form is not None:
            _replace_forward(module, form(module), active)


def _candidates(module: Any) -> list[Callable[[Any], Forward]]:
    """The forms that a layer may have, judged by its names alone."""
    has_weight = getattr(module, "weight", None) is not None
    if has_weight and type(module).__name__.endswith("RMSNorm"):
        return list(_NORMS)
    if hasattr(module, "down_proj") and _activation(module) is not None:
        if hasattr(module, "gate_proj") and hasattr(module, "up_proj"):
            return [_fused_gate]
        if hasattr(module, "gate_up_proj"):
            return [_fused_joined_gate]
    return []


def _equal_form(
    module: Any, candidates: list[Callable[[Any], Forward]]
) -> Callable[[Any], Forward] | None:
    """Return the first form that computes what a layer's own code computes; None: none does."""
    with torch.no_grad():
        for form in candidates:
            try:
                x = _random_input(module)
                if _is_equal(form(module)(x), module(x)):
                    return form
            # The layer has other attributes, weights or arguments than the form expects: whatever
            # that raises, its own code computes it.
            except Exception:
                continue
    return None


def _random_input(module: Any) -> torch.Tensor:
    """Draw an input of a layer [1, tokens, width] without PyTorch's global generator."""
    # A projection's weight may hold two 4-bit numbers in a byte, so its width is asked.
    first = getattr(module, "gate_proj", None) or getattr(module, "gate_up_proj", None)
    weight = module.weight if first is None else first.weight
    width = len(weight) if first is None else first.in_features
    dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, COMPARED_TOKENS, width, generator=generator)
    return x.to(weight.device, dtype)


def _is_equal(computed: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two results are equal: in float32 but for the last bits, in 16 bits entirely."""
    if computed.dtype != torch.float32:
        return torch.equal(computed, expected)
    return torch.allclose(computed, expected, rtol=1e-5, atol=1e-6)


def _replace_forward(
    module: torch.nn.Module,
    fused: Forward,
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


def _norm_form(offset: float, rounds_last: bool) -> Callable[[Any], Forward]:
    """Return a form of RMS norms.

    Args:
        offset: Added to the weight (Gemma: 1).
        rounds_last: Whether the result is rounded to 16 bits after it is multiplied by the weight,
            instead of before.
    """

    def form(module: Any) -> Forward:
        epsilon = getattr(module, "variance_epsilon", None)
        if epsilon is None:
            epsilon = module.eps
        weight = module.weight
        if rounds_last:
            # A frozen weight, so it is computed once.
            weight = offset + weight.detach().float()

        def forward(x: torch.Tensor) -> torch.Tensor:
            return rms_norm(x, weight, epsilon, rounds_last)

        return forward

    return form


_NORMS = (
    _norm_form(0.0, rounds_last=False),
    _norm_form(0.0, rounds_last=True),
    _norm_form(1.0, rounds_last=True),
)
"""The usual form (Llama's) first."""


def _activation(module: Any) -> Callable[..., torch.Tensor] | None:
    """The gated activation of a feed-forward layer, if it is one of those below."""
    activation = getattr(module, "act_fn", None)
    if activation is None:
        activation = getattr(module, "activation_fn", None)
    for name, gated in (("silu", swiglu), ("gelu_pytorch_tanh", geglu)):
        if isinstance(activation, type(ACT2FN[name])):
            return gated
    return swiglu if isinstance(activation, torch.nn.SiLU) else None


def _fused_gate(module: Any) -> Forward:
    gated = _activation(module)
    assert gated is not None

    def forward(x: torch.Tensor) -> torch.Tensor:
        # No name is bound to the product, so that it can be freed as soon as nothing needs it.
        output: torch.Tensor = module.down_proj(
            gated(module.gate_proj(x), module.up_proj(x))
        )
        return output

    return forward


def _fused_joined_gate(module: Any) -> Forward:
    """The same where one layer computes gate and up (Phi 3)."""
    gated = _activation(module)
    assert gated is not None

    def forward(x: torch.Tensor) -> torch.Tensor:
        gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
        output: torch.Tensor = module.down_proj(gated(gate, up))
        return output

    return forward
