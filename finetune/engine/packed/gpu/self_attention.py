"""The attention of one block of the GPU decoder, with its norm and its residual connection."""

from dataclasses import dataclass
from typing import Any

import torch

from finetune.engine.packed.gpu.attention import (
    AttentionTrace,
    attention,
    attention_backward,
)
from finetune.engine.packed.gpu.context import PassContext
from finetune.engine.packed.gpu.linear_group import linear_group
from finetune.engine.packed.gpu.rms_norm import rms_norm, rms_norm_backward
from finetune.engine.packed.gpu.rotary import apply_rotary


@dataclass(frozen=True)
class _HeadNorm:
    """Input and statistics of the norm of queries or keys (Qwen 3)."""

    x: torch.Tensor
    """[tokens · heads, head_dim]"""
    inverse_rms: torch.Tensor
    """[tokens · heads]"""


@dataclass(frozen=True)
class AttentionActivations:
    """What attention keeps for its backward pass."""

    x: torch.Tensor
    """The block's input [tokens, hidden_size]."""
    normalized: torch.Tensor | None
    """Input of the query, key and value layers; None: no adapter reads it."""
    inverse_rms: torch.Tensor
    """Of the norm before these layers [tokens]."""
    head_norms: dict[str, _HeadNorm]
    """By `q` and `k`; empty where the model has no such norms."""
    trace: AttentionTrace
    shrunk_qkv: torch.Tensor | None
    """See `LinearGroup`."""
    shrunk_output: torch.Tensor | None
    """See `LinearGroup`."""


class SelfAttention:
    """Norm, attention, and the residual connection around them."""

    def __init__(
        self,
        module: Any,
        name: str,
        table_rows: dict[str, int],
        sliding_window: int | None,
    ) -> None:
        """Read the layers and settings.

        Args:
            module: Transformers' decoder layer.
            name: Its full name in the base.
            table_rows: Each linear layer's row in the slots' tables, by full name.
            sliding_window: For models whose attention modules do not hold it themselves.
        """
        attention_module = module.self_attn
        module_name = f"{name}.self_attn"
        qkv = ("q_proj", "k_proj", "v_proj")
        self._qkv = linear_group(attention_module, module_name, qkv, table_rows)
        self._output = linear_group(
            attention_module,
            module_name,
            ("o_proj",),
            table_rows,
        )
        self._norm = module.input_layernorm
        self._head_norms: dict[str, Any] = {}
        """Qwen 3's norms of queries (`q`) and keys (`k`); None in other models."""
        for head in ("q", "k"):
            self._head_norms[head] = getattr(attention_module, f"{head}_norm", None)
        # SmolLM3 has layers without the rotary embedding.
        self._rotary = bool(getattr(attention_module, "use_rope", True))
        self._head_dim = attention_module.head_dim
        self._scale = attention_module.scaling
        self._window = getattr(attention_module, "sliding_window", sliding_window)

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
        normalized, inverse_rms, residual = rms_norm(
            x,
            self._norm.weight,
            self._norm.variance_epsilon,
            copy_input=True,
        )
        outputs, shrunk_qkv = self._qkv.forward(normalized, context)
        # Only the gradient of an adapter's A reads it.
        if shrunk_qkv is None:
            normalized = None
        heads, head_norms = self._heads(outputs, context)
        trace = attention(
            query=heads["q"],
            key=heads["k"],
            value=heads["v"],
            tables=context.spans,
            scale=self._scale,
            window=self._window,
        )
        joined_heads = trace.output.flatten(1)
        (residual,), shrunk_output = self._output.forward(
            joined_heads, context, residual=residual
        )
        activations = AttentionActivations(
            x=x,
            normalized=normalized,
            inverse_rms=inverse_rms,
            head_norms=head_norms,
            trace=trace,
            shrunk_qkv=shrunk_qkv,
            shrunk_output=shrunk_output,
        )
        return residual, activations

    def _heads(
        self, outputs: list[torch.Tensor], context: PassContext
    ) -> tuple[dict[str, torch.Tensor], dict[str, _HeadNorm]]:
        """Queries, keys and values [tokens, heads, head_dim], normalised and rotated.

        Args:
            outputs: Of the query, key and value layers; the list is emptied.
            context: The pass.
        """
        views = [output.view(len(output), -1, self._head_dim) for output in outputs]
        heads = dict(zip("qkv", views, strict=True))
        # `heads` alone refers to them now, so each is freed once it has been rotated.
        outputs.clear()
        views.clear()
        head_norms = {}
        for name, norm in self._head_norms.items():
            if norm is not None:
                shape = heads[name].shape
                x = heads[name].view(-1, self._head_dim)
                y, inverse_rms, _ = rms_norm(x, norm.weight, norm.variance_epsilon)
                heads[name] = y.view(shape)
                head_norms[name] = _HeadNorm(x, inverse_rms)
            # Its backward pass needs the angles alone, so neither input nor output is kept for it.
            if self._rotary:
                heads[name] = apply_rotary(
                    heads[name],
                    context.cos,
                    context.sin,
                    1.0,
                )
        return heads, head_norms

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
        grad_heads = self._backward_output(grad_output, activations, context)
        grads = [grad.view(len(grad_output), -1) for grad in grad_heads]
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
            weight=self._norm.weight,
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
        grad_attention, grad_shrunk = self._output.backward(
            [grad_output], activations.shrunk_output, context
        )
        self._output.backward_a(trace.output.flatten(1), grad_shrunk, context)
        rotation = (context.cos, context.sin) if self._rotary else None
        grads = attention_backward(
            grad_attention.view(trace.output.shape),
            trace,
            context.spans,
            rotation,
        )
        # `grad_heads` alone refers to the gradients then: each is freed once a norm's replaces it.
        del grad_attention
        grad_heads = dict(zip("qkv", grads, strict=True))
        del grads
        for name, head_norm in activations.head_norms.items():
            grad = grad_heads[name].view(-1, self._head_dim)
            weight = self._head_norms[name].weight
            grad_heads[name] = rms_norm_backward(
                grad, head_norm.x, weight, head_norm.inverse_rms
            )
        return list(grad_heads.values())
