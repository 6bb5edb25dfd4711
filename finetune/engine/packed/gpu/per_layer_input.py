"""Per-layer inputs (Gemma 4): each block adds what it makes of a vector of each token.

The vectors of all blocks come from an embedding of the tokens, and from a projection of the
decoder's first hidden states.
"""

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
    add_rms_norm,
    read_norm,
    rms_norm_backward,
)
from finetune.model.decoder_blocks import DecoderBlock


@dataclass(frozen=True)
class ProjectionActivations:
    """What the projection keeps for its backward pass, where an adapter stands on it."""

    x: torch.Tensor
    """Its input [tokens, hidden_size]."""
    shrunk: torch.Tensor
    """See `LinearGroup`."""
    projected: torch.Tensor
    """Input of the norm [tokens · layers, columns]."""
    inverse_rms: torch.Tensor
    """[tokens · layers]"""


class PerLayerEmbedding:
    """Computes the per-layer inputs of all blocks."""

    def __init__(
        self, model: Any, prefix: str, table_rows: dict[str, int], block: DecoderBlock
    ) -> None:
        """Read the layers.

        Args:
            model: Transformers' decoder.
            prefix: Its name in the base.
            table_rows: Each linear layer's row in the slots' tables, by full name.
            block: What the base's blocks are made of.
        """
        self._embedding = model.embed_tokens_per_layer
        self._columns: int = model.hidden_size_per_layer_input
        self._projection = linear_group(
            model, prefix, ("per_layer_model_projection",), table_rows
        )
        self._norm = read_norm(model.per_layer_projection_norm, block)
        self._projection_scale: float = model.per_layer_model_projection_scale
        self._scale: float = model.per_layer_input_scale

    def forward(
        self, x: torch.Tensor, context: PassContext
    ) -> tuple[torch.Tensor, ProjectionActivations | None]:
        """Compute (embedding + norm(scale · projection(x))) / √2.

        Args:
            x: The first hidden states [tokens, hidden_size].
            context: The pass.

        Returns:
            The inputs [tokens, layers, columns]; the activations, None without an adapter.
        """
        inputs: torch.Tensor = self._embedding(context.input_ids)
        inputs = inputs.view(-1, self._columns)
        (output,), shrunk = self._projection.forward(x, context)
        projected = output.mul_(self._projection_scale).view(inputs.shape)
        inverse_rms = add_rms_norm(inputs, projected, self._norm)
        inputs.mul_(self._scale)
        activations = None
        if shrunk is not None:
            activations = ProjectionActivations(x, shrunk, projected, inverse_rms)
        return inputs.view(len(x), -1, self._columns), activations

    def backward(
        self,
        gradients: torch.Tensor,
        activations: ProjectionActivations,
        context: PassContext,
    ) -> None:
        """Compute the gradients of the projection's adapters, which go into the slots.

        Args:
            gradients: Of the inputs [tokens, layers, columns]; overwritten.
            activations: From `forward`.
            context: The pass.
        """
        tokens = len(gradients)
        grad_norm = gradients.view(-1, self._columns).mul_(self._scale)
        grad_projected = rms_norm_backward(
            grad_norm,
            activations.projected,
            self._norm,
            activations.inverse_rms,
            grad_x=grad_norm,
        )
        grad_output = grad_projected.mul_(self._projection_scale).view(tokens, -1)
        grad_shrunk = self._projection.backward_b(
            [grad_output], activations.shrunk, context
        )
        self._projection.backward_a(activations.x, grad_shrunk, context)


@dataclass(frozen=True)
class PerLayerInputActivations:
    """What a block keeps of this for its backward pass."""

    x: torch.Tensor | None
    """[tokens, hidden_size]; None: no adapter reads it."""
    gate: torch.Tensor
    """[tokens, columns]; the backward pass overwrites it by its gradient."""
    shrunk_gate: torch.Tensor | None
    """See `LinearGroup`."""
    shrunk_projection: torch.Tensor | None
    """See `LinearGroup`."""
    output_norm: OutputNormActivations | None


class PerLayerInput:
    """What one block adds from its per-layer input."""

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
        self._number: int = module.layer_idx
        self._activation = getattr(config, block.activation_key)
        self._gate = linear_group(module, name, ("per_layer_input_gate",), table_rows)
        self._projection = linear_group(
            module, name, ("per_layer_projection",), table_rows
        )
        self._output_norm = OutputNorm(module, block.per_layer_input_norm, block)

    def forward(
        self, x: torch.Tensor, context: PassContext
    ) -> tuple[torch.Tensor, PerLayerInputActivations]:
        """Compute x + norm(projection(activation(gate(x)) · per-layer input)).

        Args:
            x: [tokens, hidden_size]; overwritten by the sum where no adapter reads it.
            context: The pass.

        Returns:
            The sum [tokens, hidden_size], and the activations.
        """
        (gate,), shrunk_gate = self._gate.forward(x, context)
        product = gated_product(gate, self._input(context), self._activation)
        residual = x if shrunk_gate is None else x.clone()
        total, shrunk_projection, output_norm = self._output_norm.forward(
            self._projection, product, residual, context
        )
        activations = PerLayerInputActivations(
            x=None if shrunk_gate is None else x,
            gate=gate,
            shrunk_gate=shrunk_gate,
            shrunk_projection=shrunk_projection,
            output_norm=output_norm,
        )
        return total, activations

    def _input(self, context: PassContext) -> torch.Tensor:
        """The block's input [tokens, columns]; its rows lie apart in memory."""
        assert context.per_layer_inputs is not None
        return context.per_layer_inputs[:, self._number]

    def backward(
        self,
        grad_output: torch.Tensor,
        activations: PerLayerInputActivations,
        context: PassContext,
    ) -> torch.Tensor:
        """Compute the gradients of the adapters, which go into the slots, and of the inputs.

        Args:
            grad_output: [tokens, hidden_size].
            activations: From `forward`; the gate and the per-layer input are overwritten.
            context: The pass.

        Returns:
            The gradient of x [tokens, hidden_size].
        """
        grad_sum = self._output_norm.backward(grad_output, activations.output_norm)
        grad_product, grad_shrunk = self._projection.backward(
            [grad_sum], activations.shrunk_projection, context
        )
        per_layer_input = self._input(context)
        # Nothing else needs gate and input again: their gradients take their places.
        product = gated_product_backward(
            grad_product,
            activations.gate,
            per_layer_input,
            self._activation,
            recompute_output=grad_shrunk is not None,
            grad_gate=activations.gate,
            grad_up=per_layer_input,
        )
        self._projection.backward_a(product, grad_shrunk, context)
        grad_x, grad_shrunk = self._gate.backward(
            [activations.gate], activations.shrunk_gate, context
        )
        self._gate.backward_a(activations.x, grad_shrunk, context)
        return grad_x.add_(grad_output)
