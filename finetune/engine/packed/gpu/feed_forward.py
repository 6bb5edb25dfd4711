"""The feed-forward layer of one block of the GPU decoder, with its norm and residual connection."""

from dataclasses import dataclass
from typing import Any

import torch

from finetune.engine.packed.gpu.context import PassContext
from finetune.engine.packed.gpu.linear_group import linear_group
from finetune.engine.packed.gpu.rms_norm import rms_norm, rms_norm_backward
from finetune.engine.packed.gpu.swiglu import swiglu, swiglu_backward


@dataclass(frozen=True)
class FeedForwardActivations:
    """What the feed-forward layer keeps for its backward pass."""

    x: torch.Tensor
    """Its input, the sum after attention [tokens, hidden_size]."""
    normalized: torch.Tensor | None
    """Input of the gate and up layers; None: no adapter reads it."""
    inverse_rms: torch.Tensor
    """Of the norm before these layers [tokens]."""
    gate: torch.Tensor
    """[tokens, intermediate_size]; the backward pass overwrites it by its gradient."""
    up: torch.Tensor
    """[tokens, intermediate_size]; the backward pass overwrites it by its gradient."""
    shrunk_gate_up: torch.Tensor | None
    """See `LinearGroup`."""
    shrunk_down: torch.Tensor | None
    """See `LinearGroup`."""


class FeedForward:
    """Norm, SwiGLU, and the residual connection around them."""

    def __init__(
        self,
        module: Any,
        name: str,
        table_rows: dict[str, int],
    ) -> None:
        """Read the layers.

        Args:
            module: Transformers' decoder layer.
            name: Its full name in the base.
            table_rows: Each linear layer's row in the slots' tables, by full name.
        """
        self._norm = module.post_attention_layernorm
        module_name = f"{name}.mlp"
        gate_up = ("gate_proj", "up_proj")
        self._gate_up = linear_group(module.mlp, module_name, gate_up, table_rows)
        self._down = linear_group(
            module.mlp,
            module_name,
            ("down_proj",),
            table_rows,
        )

    def forward(
        self,
        x: torch.Tensor,
        context: PassContext,
        recompute: bool,
    ) -> tuple[torch.Tensor | None, FeedForwardActivations]:
        """Compute x + down(swiglu(gate(norm(x)), up(norm(x)))).

        Args:
            x: [tokens, hidden_size].
            context: The pass.
            recompute: Only the activations are needed: the last product is left out.

        Returns:
            The sum [tokens, hidden_size], None where it is left out; the activations.
        """
        normalized: torch.Tensor | None
        # The copy of x is where the sum is built: a recomputed layer has none.
        normalized, inverse_rms, residual = rms_norm(
            x,
            self._norm.weight,
            self._norm.variance_epsilon,
            copy_input=not recompute,
        )
        (gate, up), shrunk_gate_up = self._gate_up.forward(normalized, context)
        # Only the gradient of an adapter's A reads it.
        if shrunk_gate_up is None:
            normalized = None
        output = None
        shrunk_down = None
        # No name is bound to the product of gate and up: the backward pass computes it again.
        if not recompute:
            (output,), shrunk_down = self._down.forward(
                swiglu(gate, up), context, residual=residual
            )
        elif self._down.is_adapted(context):
            shrunk_down = self._down.shrink(swiglu(gate, up), context)
        activations = FeedForwardActivations(
            x=x,
            normalized=normalized,
            inverse_rms=inverse_rms,
            gate=gate,
            up=up,
            shrunk_gate_up=shrunk_gate_up,
            shrunk_down=shrunk_down,
        )
        return output, activations

    def backward(
        self,
        grad_output: torch.Tensor,
        activations: FeedForwardActivations,
        context: PassContext,
    ) -> torch.Tensor:
        """Compute the gradients of the adapters, which go into the slots, and of the input.

        Args:
            grad_output: [tokens, hidden_size].
            activations: From `forward`; `gate` and `up` are overwritten.
            context: The pass.

        Returns:
            The gradient of x [tokens, hidden_size].
        """
        grad_product, grad_shrunk = self._down.backward(
            [grad_output], activations.shrunk_down, context
        )
        is_down_adapted = grad_shrunk is not None
        # The down layer's A gets its gradient from the product; nothing else needs it again.
        product = swiglu_backward(
            grad_product,
            activations.gate,
            activations.up,
            recompute_output=is_down_adapted,
        )
        self._down.backward_a(product, grad_shrunk, context)
        # The product of gate and up is as large as either of them.
        del grad_product, product
        # `swiglu_backward` has overwritten both by their gradients.
        grads = [activations.gate, activations.up]
        grad_normalized, grad_shrunk = self._gate_up.backward(
            grads, activations.shrunk_gate_up, context
        )
        self._gate_up.backward_a(activations.normalized, grad_shrunk, context)
        return rms_norm_backward(
            grad_normalized,
            x=activations.x,
            weight=self._norm.weight,
            inverse_rms=activations.inverse_rms,
            grad_residual=grad_output,
        )
