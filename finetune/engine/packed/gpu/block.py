"""One block of the GPU decoder: attention and feed-forward layer, each added to its input.

Blocks of Gemma 4 also have a per-layer input, and a factor of their output.

Forward and backward are written out, without autograd. Tensors that are not needed any more are
dropped at once, here and below, to make room for the next ones.
"""

from dataclasses import dataclass
from typing import Any

import torch

from finetune.engine.packed.gpu.context import PassContext
from finetune.engine.packed.gpu.delta_net import DeltaNet, DeltaNetActivations
from finetune.engine.packed.gpu.feed_forward import FeedForward, FeedForwardActivations
from finetune.engine.packed.gpu.per_layer_input import (
    PerLayerInput,
    PerLayerInputActivations,
)
from finetune.engine.packed.gpu.self_attention import (
    AttentionActivations,
    SelfAttention,
)
from finetune.model.decoder_blocks import DecoderBlock, has_per_layer_inputs


@dataclass(frozen=True)
class BlockActivations:
    """What a block keeps for its backward pass."""

    attention: AttentionActivations | DeltaNetActivations
    feed_forward: FeedForwardActivations
    per_layer_input: PerLayerInputActivations | None

    @property
    def block_input(self) -> torch.Tensor:
        """What the block can be recomputed from [tokens, hidden_size]."""
        return self.attention.block_input


class Block:
    """One block of the decoder, on the base's own weights."""

    def __init__(
        self,
        module: Any,
        name: str,
        table_rows: dict[str, int],
        config: Any,
        block: DecoderBlock,
        layer_type: str | None,
    ) -> None:
        """Read the block's layers and settings.

        Args:
            module: Transformers' decoder layer.
            name: Its full name in the base.
            table_rows: Each linear layer's row in the slots' tables, by full name.
            config: The base's text config.
            block: What the base's blocks are made of.
            layer_type: Selects the angles of the rotary embedding (`PassContext.angles`).
        """
        # Some layers of Qwen 3.5 have a gated delta net instead.
        self._attention: Any
        if hasattr(module, "linear_attn"):
            self._attention = DeltaNet(module, name, table_rows, block)
        else:
            self._attention = SelfAttention(
                module, name, table_rows, config, block, layer_type
            )
        self._feed_forward = FeedForward(module, name, table_rows, config, block)
        self._per_layer_input: PerLayerInput | None = None
        if has_per_layer_inputs(config, block):
            self._per_layer_input = PerLayerInput(
                module, name, table_rows, config, block
            )
        self._scalar = 1.0
        if block.output_scalar is not None:
            self._scalar = float(getattr(module, block.output_scalar))

    def forward(
        self,
        x: torch.Tensor,
        context: PassContext,
        recompute: bool = False,
    ) -> tuple[torch.Tensor | None, BlockActivations]:
        """Compute the block.

        Args:
            x: [tokens, hidden_size].
            context: The pass.
            recompute: Only the activations are needed: the last product is left out, unless a norm
                follows it.

        Returns:
            The output [tokens, hidden_size], None where it is left out; the activations.
        """
        x, attention_activations = self._attention.forward(x, context)
        has_input = self._per_layer_input is not None
        output, feed_forward_activations = self._feed_forward.forward(
            x, context, recompute and not has_input
        )
        input_activations = None
        if self._per_layer_input is not None:
            assert output is not None
            output, input_activations = self._per_layer_input.forward(output, context)
        if output is not None and self._scalar != 1.0:
            output.mul_(self._scalar)
        activations = BlockActivations(
            attention_activations, feed_forward_activations, input_activations
        )
        return output, activations

    def backward(
        self,
        grad_output: torch.Tensor,
        activations: BlockActivations,
        context: PassContext,
        need_input_grad: bool,
    ) -> torch.Tensor | None:
        """Compute the gradients of the adapters, which go into the slots, and of the input.

        Args:
            grad_output: [tokens, hidden_size]; may be overwritten.
            activations: From `forward`; overwritten.
            context: The pass.
            need_input_grad: False for the first block.

        Returns:
            The gradient of the input [tokens, hidden_size] if it is needed.
        """
        grad = grad_output
        if self._scalar != 1.0:
            grad.mul_(self._scalar)
        if self._per_layer_input is not None:
            assert activations.per_layer_input is not None
            grad = self._per_layer_input.backward(
                grad, activations.per_layer_input, context
            )
        grad = self._feed_forward.backward(grad, activations.feed_forward, context)
        grad_x: torch.Tensor | None = self._attention.backward(
            grad, activations.attention, context, need_input_grad
        )
        return grad_x
