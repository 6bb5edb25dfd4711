"""One block of the GPU decoder: attention and feed-forward layer, each added to its input.

Forward and backward are written out, without autograd. Tensors that are not needed any more are
dropped at once, here and below, to make room for the next ones.
"""

from dataclasses import dataclass
from typing import Any

import torch

from finetune.engine.packed.gpu.context import PassContext
from finetune.engine.packed.gpu.delta_net import DeltaNet, DeltaNetActivations
from finetune.engine.packed.gpu.feed_forward import FeedForward, FeedForwardActivations
from finetune.engine.packed.gpu.self_attention import (
    AttentionActivations,
    SelfAttention,
)
from finetune.model.decoder_blocks import DecoderBlock


@dataclass(frozen=True)
class BlockActivations:
    """What a block keeps for its backward pass."""

    attention: AttentionActivations | DeltaNetActivations
    feed_forward: FeedForwardActivations

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
            recompute: Only the activations are needed: the last product is left out.

        Returns:
            The output [tokens, hidden_size], None where it is left out; the activations.
        """
        x, attention_activations = self._attention.forward(x, context)
        output, feed_forward_activations = self._feed_forward.forward(
            x, context, recompute
        )
        return output, BlockActivations(attention_activations, feed_forward_activations)

    def backward(
        self,
        grad_output: torch.Tensor,
        activations: BlockActivations,
        context: PassContext,
        need_input_grad: bool,
    ) -> torch.Tensor | None:
        """Compute the gradients of the adapters, which go into the slots, and of the input.

        Args:
            grad_output: [tokens, hidden_size].
            activations: From `forward`; overwritten.
            context: The pass.
            need_input_grad: False for the first block.

        Returns:
            The gradient of the input [tokens, hidden_size] if it is needed.
        """
        grad = self._feed_forward.backward(
            grad_output, activations.feed_forward, context
        )
        grad_x: torch.Tensor | None = self._attention.backward(
            grad, activations.attention, context, need_input_grad
        )
        return grad_x
