"""The attention of one block of the GPU decoder, with its norms and its residual connection."""

from dataclasses import dataclass
from typing import Any

import torch

from finetune.engine.packed.gpu.attention import (
    AttentionTrace,
    attention,
    attention_backward,
)
from finetune.engine.packed.gpu.context import PassContext
from finetune.engine.packed.gpu.heads import HeadActivations, Heads
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
class AttentionActivations:
    """What attention keeps for its backward pass."""

    x: torch.Tensor
    """The block's input [tokens, hidden_size]."""
    normalized: torch.Tensor | None
    """Input of the query, key and value layers; None: no adapter reads it."""
    inverse_rms: torch.Tensor
    """Of the norm before these layers [tokens]."""
    heads: HeadActivations
    trace: AttentionTrace
    shrunk_qkv: torch.Tensor | None
    """See `LinearGroup`."""
    shrunk_output: torch.Tensor | None
    """See `LinearGroup`."""
    output_norm: OutputNormActivations | None


class SelfAttention:
    """Norm, attention, and the residual connection around them."""

    def __init__(
        self,
        module: Any,
        name: str,
        table_rows: dict[str, int],
        config: Any,
        block: DecoderBlock,
        layer_type: str | None,
    ) -> None:
        """Read the layers and settings.

        Args:
            module: Transformers' decoder layer.
            name: Its full name in the base.
            table_rows: Each linear layer's row in the slots' tables, by full name.
            config: The base's text config.
            block: What the base's blocks are made of.
            layer_type: Selects the angles of the rotary embedding (`PassContext.angles`).
        """
        attention_module = module.self_attn
        module_name = f"{name}.self_attn"
        self._qkv = linear_group(attention_module, module_name, block.qkv, table_rows)
        self._output = linear_group(
            attention_module,
            module_name,
            ("o_proj",),
            table_rows,
        )
        self._norm = read_norm(getattr(module, block.attention_norm), block)
        self._output_norm = OutputNorm(module, block.attention_output_norm, block)
        self._heads = Heads(attention_module, config, block, layer_type)
        self._scale = attention_module.scaling
        if block.config_window:
            self._window = config.sliding_window
        else:
            self._window = getattr(attention_module, "sliding_window", None)

    def forward(
        self, x: torch.Tensor, context: PassContext
    ) -> tuple[torch.Tensor, AttentionActivations]:
        """Compute x + attention(norm(x)).

        Args:
            x: [tokens, hidden_size].
            context: The pass.

        Returns:
            The sum [tokens, hidden_size], in memory of its own, and the activations.
        """
        normalized: torch.Tensor | None
        # x itself is an activation: the sum is built in a copy of it.
        normalized, inverse_rms, residual = rms_norm(x, self._norm, copy_input=True)
        assert residual is not None
        outputs, shrunk_qkv = self._qkv.forward(normalized, context)
        # Only the gradient of an adapter's A reads it.
        if shrunk_qkv is None:
            normalized = None
        heads, head_activations = self._heads.forward(outputs, context)
        trace = attention(
            query=heads["q"],
            key=heads["k"],
            value=heads["v"],
            tables=context.spans,
            scale=self._scale,
            window=self._window,
        )
        joined_heads = trace.output.flatten(1)
        total, shrunk_output, output_norm = self._output_norm.forward(
            self._output, joined_heads, residual, context
        )
        activations = AttentionActivations(
            x=x,
            normalized=normalized,
            inverse_rms=inverse_rms,
            heads=head_activations,
            trace=trace,
            shrunk_qkv=shrunk_qkv,
            shrunk_output=shrunk_output,
            output_norm=output_norm,
        )
        return total, activations

    def backward(
        self,
        grad_output: torch.Tensor,
        activations: AttentionActivations,
        context: PassContext,
        need_input_grad: bool,
    ) -> torch.Tensor | None:
        """Compute the gradients of the adapters, which go into the slots, and of the input.

        Args:
            grad_output: [tokens, hidden_size].
            activations: From `forward`.
            context: The pass.
            need_input_grad: False for the first block, whose input has no gradient.

        Returns:
            The gradient of x [tokens, hidden_size] if it is needed.
        """
        grads = self._backward_output(grad_output, activations, context)
        # Without the products with the base's weights, which only the input's gradient needs.
        if not need_input_grad:
            grad_shrunk = self._qkv.backward_b(grads, activations.shrunk_qkv, context)
            self._qkv.backward_a(activations.normalized, grad_shrunk, context)
            return None
        grad_normalized, grad_shrunk = self._qkv.backward(
            grads, activations.shrunk_qkv, context
        )
        self._qkv.backward_a(activations.normalized, grad_shrunk, context)
        return rms_norm_backward(
            grad_normalized,
            x=activations.x,
            norm=self._norm,
            inverse_rms=activations.inverse_rms,
            grad_residual=grad_output,
        )

    def _backward_output(
        self,
        grad_output: torch.Tensor,
        activations: AttentionActivations,
        context: PassContext,
    ) -> list[torch.Tensor]:
        """Gradients of the outputs of the query, key and value layers."""
        trace = activations.trace
        grad_sum = self._output_norm.backward(grad_output, activations.output_norm)
        grad_attention, grad_shrunk = self._output.backward(
            [grad_sum], activations.shrunk_output, context
        )
        self._output.backward_a(trace.output.flatten(1), grad_shrunk, context)
        grads, grad_heads = self._heads.empty_gradients(
            (trace.query, trace.key, trace.value)
        )
        attention_backward(
            grad_attention.view(trace.output.shape),
            trace,
            context.spans,
            grad_heads,
            self._heads.rotation(context),
        )
        self._heads.backward(grad_heads, activations.heads, context)
        return grads
