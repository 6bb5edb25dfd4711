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
from finetune.engine.packed.gpu.gated_product import (
    gated_product,
    gated_product_backward,
)
from finetune.engine.packed.gpu.heads import HeadActivations, HeadGradients, Heads
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

GATE = "sigmoid"
"""The activation of the gate of attention's output."""


@dataclass(frozen=True)
class AttentionActivations:
    """What attention keeps for its backward pass."""

    qkv: InputActivations
    heads: HeadActivations
    trace: AttentionTrace
    shrunk_output: torch.Tensor | None
    """See `LinearGroup`."""
    output_norm: OutputNormActivations | None

    @property
    def block_input(self) -> torch.Tensor:
        """The input of the block [tokens, hidden_size]."""
        return self.qkv.x


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
        projections = tuple(
            projection
            for projection in block.qkv
            if getattr(attention_module, projection, None) is not None
        )
        self._qkv = NormalizedInput(
            read_norm(getattr(module, block.attention_norm), block),
            linear_group(attention_module, module_name, projections, table_rows),
        )
        self._output = linear_group(
            attention_module,
            module_name,
            ("o_proj",),
            table_rows,
        )
        self._output_norm = OutputNorm(module, block.attention_output_norm, block)
        self._heads = Heads(attention_module, projections, config, block, layer_type)
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
        # x itself is an activation: the sum is built in a copy of it.
        outputs, residual, qkv = self._qkv.forward(x, context)
        assert residual is not None
        heads, head_activations = self._heads.forward(outputs, context)
        trace = attention(
            query=heads["q"],
            key=heads["k"],
            value=heads["v"],
            tables=context.spans,
            scale=self._scale,
            window=self._window,
        )
        attended = trace.output.view(-1, self._heads.head_dim)
        if head_activations.gate is not None:
            attended = gated_product(head_activations.gate, attended, GATE)
        total, shrunk_output, output_norm = self._output_norm.forward(
            self._output, attended.view(len(x), -1), residual, context
        )
        activations = AttentionActivations(
            qkv=qkv,
            heads=head_activations,
            trace=trace,
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
        trace = activations.trace
        gradients = self._heads.empty_gradients(trace.query)
        grad_attended = self._backward_output(
            grad_output, activations, gradients, context
        )
        attention_backward(
            grad_attended.view(trace.output.shape),
            trace,
            context.spans,
            gradients.heads,
            self._heads.rotation(context),
        )
        # Makes room.
        del grad_attended
        self._heads.backward(gradients, activations.heads, context)
        return self._qkv.backward(
            gradients.outputs, grad_output, activations.qkv, context, need_input_grad
        )

    def _backward_output(
        self,
        grad_output: torch.Tensor,
        activations: AttentionActivations,
        gradients: HeadGradients,
        context: PassContext,
    ) -> torch.Tensor:
        """Gradient of the attention's output [tokens, columns]; sets that of the gate."""
        output = activations.trace.output
        grad_sum = self._output_norm.backward(grad_output, activations.output_norm)
        grad_attended, grad_shrunk = self._output.backward(
            [grad_sum], activations.shrunk_output, context
        )
        gate = activations.heads.gate
        if gate is None:
            self._output.backward_a(output.flatten(1), grad_shrunk, context)
            return grad_attended
        assert gradients.gate is not None
        grad_gated = grad_attended.view(gate.shape)
        grad_attended = torch.empty_like(grad_attended)
        gated = gated_product_backward(
            grad_gated,
            gate,
            output.view(gate.shape),
            GATE,
            recompute_output=grad_shrunk is not None,
            grad_gate=gradients.gate,
            grad_up=grad_attended.view(gate.shape),
        )
        if gated is not None:
            self._output.backward_a(gated.view(len(output), -1), grad_shrunk, context)
        return grad_attended
