"""The gated delta net of one block of the GPU decoder, in place of attention (Qwen 3.5)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import softplus

from finetune.engine.packed.gpu.context import PassContext
from finetune.engine.packed.gpu.delta_rule import DeltaRule
from finetune.engine.packed.gpu.gated_norm import gated_norm, gated_norm_backward
from finetune.engine.packed.gpu.linear_group import linear_group
from finetune.engine.packed.gpu.normalized_input import (
    InputActivations,
    NormalizedInput,
)
from finetune.engine.packed.gpu.rms_norm import RmsNorm, read_norm
from finetune.engine.packed.gpu.short_convolution import (
    short_convolution,
    short_convolution_backward,
)
from finetune.model.decoder_blocks import DecoderBlock

INPUTS = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
"""The layers of queries, keys and values together; of the output's gate; of the rates; and of the
decays."""


@dataclass(frozen=True)
class DeltaNetActivations:
    """What a gated delta net keeps for its backward pass."""

    inputs: InputActivations
    mixed: torch.Tensor
    """Queries, keys and values before the convolution [tokens, columns]."""
    gate: torch.Tensor
    """[tokens, value columns]; the backward pass overwrites it by its gradient."""
    rates: torch.Tensor
    """Of the states' updates before the sigmoid [tokens, value heads]."""
    decays: torch.Tensor
    """What the states' decays are computed from [tokens, value heads]."""
    output: torch.Tensor
    """Of the delta rule [tokens · value heads, columns of a head]."""
    shrunk_output: torch.Tensor | None
    """See `LinearGroup`."""

    @property
    def block_input(self) -> torch.Tensor:
        """The input of the block [tokens, hidden_size]."""
        return self.inputs.x


class DeltaNet:
    """Norm, gated delta net, and the residual connection around them."""

    def __init__(
        self,
        module: Any,
        name: str,
        table_rows: dict[str, int],
        block: DecoderBlock,
    ) -> None:
        """Read the layers and settings.

        Args:
            module: Transformers' decoder layer.
            name: Its full name in the base.
            table_rows: Each linear layer's row in the slots' tables, by full name.
            block: What the base's blocks are made of.
        """
        net = module.linear_attn
        module_name = f"{name}.linear_attn"
        self._inputs = NormalizedInput(
            read_norm(getattr(module, block.attention_norm), block),
            linear_group(net, module_name, INPUTS, table_rows),
        )
        self._output = linear_group(net, module_name, ("out_proj",), table_rows)
        # Without the offset of the other norms.
        self._norm = RmsNorm(net.norm.weight, net.norm.variance_epsilon, False)
        self._convolution = net.conv1d.weight.detach()[:, 0].contiguous()
        self._decay_factors = -net.A_log.detach().float().exp()
        self._decay_offsets = net.dt_bias.detach().float()
        self._rule = DeltaRule(
            key_heads=net.num_k_heads,
            value_heads=net.num_v_heads,
            key_columns=net.head_k_dim,
            value_columns=net.head_v_dim,
        )

    def forward(
        self, x: torch.Tensor, context: PassContext
    ) -> tuple[torch.Tensor, DeltaNetActivations]:
        """Compute x + delta net(norm(x)).

        Args:
            x: [tokens, hidden_size].
            context: The pass.

        Returns:
            The sum [tokens, hidden_size], in memory of its own, and the activations.
        """
        (mixed, gate, rates, decays), residual, inputs = self._inputs.forward(
            x, context
        )
        qkv = short_convolution(mixed, self._convolution, context.position_ids)
        assert context.rows is not None
        output = self._rule.forward(
            qkv, self._log_decays(decays), _sigmoid(rates), context.rows
        )
        # Makes room.
        del qkv
        output = output.view(-1, self._rule.value_columns)
        gated = gated_norm(output, gate.view(output.shape), self._norm)
        (total,), shrunk_output = self._output.forward(
            gated.view(len(x), -1), context, residual=residual
        )
        activations = DeltaNetActivations(
            inputs=inputs,
            mixed=mixed,
            gate=gate,
            rates=rates,
            decays=decays,
            output=output,
            shrunk_output=shrunk_output,
        )
        return total, activations

    def _log_decays(self, decays: torch.Tensor) -> torch.Tensor:
        """Logarithms of the states' decays, float32 [tokens, value heads]."""
        steps: torch.Tensor = softplus(decays.float() + self._decay_offsets)
        log_decays: torch.Tensor = self._decay_factors * steps
        return log_decays

    def backward(
        self,
        grad_output: torch.Tensor,
        activations: DeltaNetActivations,
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
        assert context.rows is not None
        grad_rule = self._backward_output(grad_output, activations, context)
        position_ids = context.position_ids
        qkv = short_convolution(activations.mixed, self._convolution, position_ids)
        rates = _sigmoid(activations.rates)
        grad_qkv, grad_log_decays, grad_rates = self._rule.backward(
            grad_rule, qkv, self._log_decays(activations.decays), rates, context.rows
        )
        # Makes room.
        del qkv, grad_rule
        grad_mixed = short_convolution_backward(
            grad_qkv, activations.mixed, self._convolution, position_ids
        )
        del grad_qkv
        grad_rates.mul_(rates * (1 - rates))
        slopes = _sigmoid(activations.decays + self._decay_offsets)
        grad_decays = grad_log_decays * self._decay_factors * slopes
        dtype = grad_mixed.dtype
        grads = [
            grad_mixed,
            activations.gate,
            grad_rates.to(dtype),
            grad_decays.to(dtype),
        ]
        return self._inputs.backward(
            grads, grad_output, activations.inputs, context, need_input_grad
        )

    def _backward_output(
        self,
        grad_output: torch.Tensor,
        activations: DeltaNetActivations,
        context: PassContext,
    ) -> torch.Tensor:
        """Gradient of the delta rule's output; turns the gate into its gradient."""
        output = activations.output
        grad_gated, grad_shrunk = self._output.backward(
            [grad_output], activations.shrunk_output, context
        )
        grad_rule, gated = gated_norm_backward(
            grad_gated.view(output.shape),
            output,
            activations.gate.view(output.shape),
            self._norm,
            recompute_output=grad_shrunk is not None,
        )
        if gated is not None:
            joined = gated.view(len(grad_output), -1)
            self._output.backward_a(joined, grad_shrunk, context)
        return grad_rule


def _sigmoid(values: torch.Tensor) -> torch.Tensor:
    """In float32."""
    return values.float().sigmoid()
