"""The feed-forward layer of a block of the GPU decoder, with norms and residual connection."""

from dataclasses import dataclass
from typing import Any

import torch

from finetune.engine.packed.gpu.adapted_gate import (
    UnadaptedOutput,
    adapted_gate,
    adapted_gate_backward,
    gate_adds_adapters,
)
from finetune.engine.packed.gpu.context import PassContext
from finetune.engine.packed.gpu.gated_product import (
    gated_product,
    gated_product_backward,
)
from finetune.engine.packed.gpu.linear_group import linear_group
from finetune.engine.packed.gpu.normalized_input import (
    InputActivations,
    NormalizedInput,
)
from finetune.engine.packed.gpu.residual_sum import (
    OutputNorm,
    OutputNormActivations,
)
from finetune.engine.packed.gpu.rms_norm import read_norm
from finetune.model.decoder_blocks import DecoderBlock


@dataclass(frozen=True)
class FeedForwardActivations:
    """What the feed-forward layer keeps for its backward pass."""

    inputs: InputActivations
    gate_up: list[torch.Tensor]
    """Outputs of the gate and up layers [tokens, intermediate_size], or of the one that computes
    both [tokens, 2 · intermediate_size], without the contributions of `_pending_shrunk`; the
    backward pass overwrites them by their gradients."""
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
        self._output_norm = OutputNorm(module, block.feed_forward_output_norm, block)
        self._activation = getattr(config, block.activation_key)
        module_name = f"{name}.mlp"
        self._gate_up = NormalizedInput(
            read_norm(getattr(module, block.feed_forward_norm), block),
            linear_group(module.mlp, module_name, block.gate_up, table_rows),
        )
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
        skips_product = recompute and self._output_norm.norm is None
        # The copy of x is where the sum is built: a recomputed layer has none.
        gate_up, residual, inputs = self._gate_up.forward(
            x,
            context,
            copy_input=not skips_product,
            add_adapters=not gate_adds_adapters(context.adapters),
        )
        pending = _pending_shrunk(inputs, context)
        total = None
        shrunk_down = None
        output_norm = None
        # No name is bound to the product of gate and up: the backward pass computes it again.
        if residual is not None:
            total, shrunk_down, output_norm = self._output_norm.forward(
                self._down,
                self._product(gate_up, pending, context),
                residual,
                context,
            )
        elif self._down.is_adapted(context):
            product = self._product(gate_up, pending, context)
            shrunk_down = self._down.shrink(product, context)
        activations = FeedForwardActivations(
            inputs=inputs,
            gate_up=gate_up,
            shrunk_down=shrunk_down,
            output_norm=output_norm,
        )
        return total, activations

    def _product(
        self,
        gate_up: list[torch.Tensor],
        pending: torch.Tensor | None,
        context: PassContext,
    ) -> torch.Tensor:
        if pending is None:
            return gated_product(*_split(gate_up), self._activation)
        gate, up = self._unadapted(gate_up, pending)
        return adapted_gate(gate, up, context.adapters, self._activation)

    def _unadapted(
        self, gate_up: list[torch.Tensor], shrunk: torch.Tensor
    ) -> tuple[UnadaptedOutput, UnadaptedOutput]:
        """Gate and up, with what their adapters' contributions are computed from."""
        gate, up = _split(gate_up)
        first_row = self._gate_up.layers.table_row
        gate_output = UnadaptedOutput(gate, shrunk[0], first_row, first_column=0)
        if len(gate_up) == 1:
            columns = gate.shape[1]
            return gate_output, UnadaptedOutput(up, shrunk[0], first_row, columns)
        return gate_output, UnadaptedOutput(up, shrunk[1], first_row + 1, 0)

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
        pending = _pending_shrunk(activations.inputs, context)
        grad_product, grad_shrunk = self._down.backward(
            [grad_sum],
            activations.shrunk_down,
            context,
            through_adapters=pending is None,
        )
        product = self._backward_product(
            grad_product, grad_shrunk, activations.gate_up, pending, context
        )
        # The down layer's A gets its gradient from the product; nothing else needs it again.
        self._down.backward_a(product, grad_shrunk, context)
        # The product of gate and up is as large as either of them.
        del grad_product, product
        # Overwritten by their gradients.
        grads = activations.gate_up
        grad_x = self._gate_up.backward(grads, grad_output, activations.inputs, context)
        assert grad_x is not None
        return grad_x

    def _backward_product(
        self,
        grad_product: torch.Tensor,
        grad_shrunk: torch.Tensor | None,
        gate_up: list[torch.Tensor],
        pending: torch.Tensor | None,
        context: PassContext,
    ) -> torch.Tensor | None:
        """Turn gate and up into their gradients, and return their product if A's gradient needs it.

        The product takes the place of its gradient.
        """
        if pending is None:
            gate, up = _split(gate_up)
            return gated_product_backward(
                grad_product,
                gate,
                up,
                self._activation,
                recompute_output=grad_shrunk is not None,
                grad_gate=gate,
                grad_up=up,
            )
        adapted_gate_backward(
            grad_product,
            # Where no adapter is on the down layer, the kernel does not read it.
            pending[0] if grad_shrunk is None else grad_shrunk[0],
            self._down.table_row,
            *self._unadapted(gate_up, pending),
            context.adapters,
            self._activation,
        )
        return grad_product


def _pending_shrunk(
    inputs: InputActivations, context: PassContext
) -> torch.Tensor | None:
    """`shrunk` of gate and up, where their contributions are left to the gate's kernels.

    None: there are no contributions, or the outputs have them.
    """
    return inputs.shrunk if gate_adds_adapters(context.adapters) else None


def _split(gate_up: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up [tokens, intermediate_size]."""
    if len(gate_up) == 1:
        gate, up = gate_up[0].chunk(2, dim=1)
    else:
        gate, up = gate_up
    return gate, up
