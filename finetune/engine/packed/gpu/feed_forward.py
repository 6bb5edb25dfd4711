"""The feed-forward layer of a block of the GPU decoder, with norms and residual connection."""

from dataclasses import dataclass
from typing import Any

import torch

from finetune.engine.packed.gpu.context import PassContext
from finetune.engine.packed.gpu.gated_product import (
    gated_product,
    gated_product_backward,
)
from finetune.engine.packed.gpu.linear_group import linear_group
from finetune.engine.packed.gpu.residual_sum import (
    OutputNorm,
    OutputNormActivations,
)
from finetune.engine.packed.gpu.rms_norm import (
    read_norm,
    rms_norm,
    rms_norm_backward,
)
from finetune.model.decoder_blocks import DecoderBlock


@dataclass(frozen=True)
class FeedForwardActivations:
    """What the feed-forward layer keeps for its backward pass."""

    x: torch.Tensor
    """Its input, the sum after attention [tokens, hidden_size]."""
    normalized: torch.Tensor | None
    """Input of the gate and up layers; None: no adapter reads it."""
    inverse_rms: torch.Tensor
    """Of the norm before these layers [tokens]."""
    gate_up: list[torch.Tensor]
    """Outputs of the gate and up layers [tokens, intermediate_size], or of the one that computes
    both [tokens, 2 · intermediate_size]; the backward pass overwrites them by their gradients."""
    shrunk_gate_up: torch.Tensor | None
    """See `LinearGroup`."""
    shrunk_down: torch.Tensor | None
    """See `LinearGroup`."""
    output_norm: OutputNormActivations | None


class FeedForward:
    """Norm, SwiGLU or GeGLU, and the residual connection around them."""

    def __init__(
        self,
        module: Any,
        name: str,
        table_rows: dict[str, int],
        config: Any,
        block: DecoderBlock,
    ) -> None:
        """Read the layers.

        Args:
            module: Transformers' decoder layer.
            name: Its full name in the base.
            table_rows: Each linear layer's row in the slots' tables, by full name.
            config: The base's text config.
            block: What the base's blocks are made of.
        """
        self._norm = read_norm(getattr(module, block.feed_forward_norm), block)
        self._output_norm = OutputNorm(module, block.feed_forward_output_norm, block)
        self._activation = getattr(config, block.activation_key)
        module_name = f"{name}.mlp"
        self._gate_up = linear_group(module.mlp, module_name, block.gate_up, table_rows)
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
        """Compute x + down(activation(gate(norm(x))) · up(norm(x))).

        Args:
            x: [tokens, hidden_size].
            context: The pass.
            recompute: Only the activations are needed: the last product is left out, unless a norm
                follows it, whose backward pass needs it.

        Returns:
            The sum [tokens, hidden_size], None where it is left out; the activations.
        """
        normalized: torch.Tensor | None
        skips_product = recompute and self._output_norm.norm is None
        # The copy of x is where the sum is built: a recomputed layer has none.
        normalized, inverse_rms, residual = rms_norm(
            x, self._norm, copy_input=not skips_product
        )
        gate_up, shrunk_gate_up = self._gate_up.forward(normalized, context)
        # Only the gradient of an adapter's A reads it.
        if shrunk_gate_up is None:
            normalized = None
        total = None
        shrunk_down = None
        output_norm = None
        # No name is bound to the product of gate and up: the backward pass computes it again.
        if residual is not None:
            total, shrunk_down, output_norm = self._output_norm.forward(
                self._down, self._product(gate_up), residual, context
            )
        elif self._down.is_adapted(context):
            shrunk_down = self._down.shrink(self._product(gate_up), context)
        activations = FeedForwardActivations(
            x=x,
            normalized=normalized,
            inverse_rms=inverse_rms,
            gate_up=gate_up,
            shrunk_gate_up=shrunk_gate_up,
            shrunk_down=shrunk_down,
            output_norm=output_norm,
        )
        return total, activations

    def _product(self, gate_up: list[torch.Tensor]) -> torch.Tensor:
        return gated_product(*_split(gate_up), self._activation)

    def backward(
        self,
        grad_output: torch.Tensor,
        activations: FeedForwardActivations,
        context: PassContext,
    ) -> torch.Tensor:
        """Compute the gradients of the adapters, which go into the slots, and of the input.

        Args:
            grad_output: [tokens, hidden_size].
            activations: From `forward`; `gate_up` is overwritten.
            context: The pass.

        Returns:
            The gradient of x [tokens, hidden_size].
        """
        grad_sum = self._output_norm.backward(grad_output, activations.output_norm)
        grad_product, grad_shrunk = self._down.backward(
            [grad_sum], activations.shrunk_down, context
        )
        is_down_adapted = grad_shrunk is not None
        gate, up = _split(activations.gate_up)
        # The down layer's A gets its gradient from the product; nothing else needs it again.
        product = gated_product_backward(
            grad_product,
            gate,
            up,
            self._activation,
            recompute_output=is_down_adapted,
            grad_gate=gate,
            grad_up=up,
        )
        self._down.backward_a(product, grad_shrunk, context)
        # The product of gate and up is as large as either of them.
        del grad_product, product
        # Overwritten by their gradients.
        grads = activations.gate_up
        grad_normalized, grad_shrunk = self._gate_up.backward(
            grads, activations.shrunk_gate_up, context
        )
        self._gate_up.backward_a(activations.normalized, grad_shrunk, context)
        return rms_norm_backward(
            grad_normalized,
            x=activations.x,
            norm=self._norm,
            inverse_rms=activations.inverse_rms,
            grad_residual=grad_output,
        )


def _split(gate_up: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up [tokens, intermediate_size]."""
    if len(gate_up) == 1:
        gate, up = gate_up[0].chunk(2, dim=1)
    else:
        gate, up = gate_up
    return gate, up
