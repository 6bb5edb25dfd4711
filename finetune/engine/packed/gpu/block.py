"""One block of the GPU decoder: attention and SwiGLU, each added to its input.

Forward and backward are written out, without autograd. Tensors that are not needed any more are
dropped at once, here and below, to make room for the next ones.
"""

from dataclasses import dataclass
from typing import Any

import torch

from finetune.engine.packed.gpu import kernels
from finetune.engine.packed.gpu.attention import AttentionTrace, attention, attention_backward
from finetune.engine.packed.gpu.context import PassContext
from finetune.engine.packed.gpu.linear_group import linear_group


@dataclass(frozen=True)
class _HeadNorm:
    """Input and statistics of the norm of queries or keys (Qwen 3)."""

    x: torch.Tensor
    """[tokens · heads, head_dim]"""
    inverse_rms: torch.Tensor
    """[tokens · heads]"""


@dataclass(frozen=True)
class _AttentionActivations:
    """What attention keeps for its backward pass."""

    x: torch.Tensor
    """The block's input [tokens, hidden_size]."""
    normalized: torch.Tensor | None
    """Input of the query, key and value layers; None: no adapter reads it."""
    inverse_rms: torch.Tensor
    head_norms: dict[str, _HeadNorm]
    """By `q` and `k`; empty where the model has no such norms."""
    trace: AttentionTrace
    shrunk_qkv: torch.Tensor | None
    shrunk_output: torch.Tensor | None


@dataclass(frozen=True)
class _FeedForwardActivations:
    """What the feed-forward layer keeps for its backward pass."""

    x: torch.Tensor
    """Its input, the sum after attention [tokens, hidden_size]."""
    normalized: torch.Tensor | None
    """Input of the gate and up layers; None: no adapter reads it."""
    inverse_rms: torch.Tensor
    gate: torch.Tensor
    """[tokens, intermediate_size]; the backward pass overwrites it by its gradient."""
    up: torch.Tensor
    """[tokens, intermediate_size]; the backward pass overwrites it by its gradient."""
    shrunk_gate_up: torch.Tensor | None
    shrunk_down: torch.Tensor | None


@dataclass(frozen=True)
class BlockActivations:
    """What a block keeps for its backward pass."""

    attention: _AttentionActivations
    feed_forward: _FeedForwardActivations

    @property
    def block_input(self) -> torch.Tensor:
        """What the block can be recomputed from [tokens, hidden_size]."""
        return self.attention.x


class Block:
    """One block of the decoder, on the base's own weights."""

    def __init__(
        self, module: Any, name: str, table_rows: dict[str, int], sliding_window: int | None
    ) -> None:
        """Read the block's layers and settings.

        Args:
            module: Transformers' decoder layer.
            name: Its full name in the base.
            table_rows: Each linear layer's row in the slots' tables, by full name.
            sliding_window: For models whose attention modules do not hold it themselves.
        """
        self._attention = _Attention(module, name, table_rows, sliding_window)
        self._feed_forward = _FeedForward(module, name, table_rows)

    def forward(
        self, x: torch.Tensor, context: PassContext, recompute: bool = False
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
        output, feed_forward_activations = self._feed_forward.forward(x, context, recompute)
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
        grad = self._feed_forward.backward(grad_output, activations.feed_forward, context)
        return self._attention.backward(grad, activations.attention, context, need_input_grad)


class _Attention:
    """Norm, attention, and the residual connection around them."""

    def __init__(
        self, module: Any, name: str, table_rows: dict[str, int], sliding_window: int | None
    ) -> None:
        attention_module = module.self_attn
        module_name = f"{name}.self_attn"
        qkv = ("q_proj", "k_proj", "v_proj")
        self._qkv = linear_group(attention_module, module_name, qkv, table_rows)
        self._output = linear_group(attention_module, module_name, ("o_proj",), table_rows)
        self._norm = module.input_layernorm
        head_norms = {"q": "q_norm", "k": "k_norm"}
        self._head_norms: dict[str, Any] = {
            head: getattr(attention_module, norm, None) for head, norm in head_norms.items()
        }
        self._rotary = bool(getattr(attention_module, "use_rope", True))
        self._head_dim = attention_module.head_dim
        self._scale = attention_module.scaling
        self._window = getattr(attention_module, "sliding_window", sliding_window)

    def forward(
        self, x: torch.Tensor, context: PassContext
    ) -> tuple[torch.Tensor, _AttentionActivations]:
        normalized: torch.Tensor | None
        normalized, inverse_rms, residual = kernels.rms_norm(
            x, self._norm.weight, self._norm.variance_epsilon, copy_input=True
        )
        outputs, shrunk_qkv = self._qkv.forward(normalized, context)
        if shrunk_qkv is None:
            normalized = None
        heads, head_norms = self._heads(outputs, context)
        trace = attention(
            heads["q"], heads["k"], heads["v"], context.spans, self._scale, self._window
        )
        (residual,), shrunk_output = self._output.forward(
            trace.output.flatten(1), context, residual=residual
        )
        activations = _AttentionActivations(
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
        outputs.clear()
        views.clear()
        traces = {}
        for name, norm in self._head_norms.items():
            if norm is not None:
                shape = heads[name].shape
                x = heads[name].view(-1, self._head_dim)
                y, inverse_rms, _ = kernels.rms_norm(x, norm.weight, norm.variance_epsilon)
                heads[name] = y.view(shape)
                traces[name] = _HeadNorm(x, inverse_rms)
            if self._rotary:
                heads[name] = kernels.apply_rotary(heads[name], context.cos, context.sin, 1.0)
        return heads, traces

    def backward(
        self,
        grad_output: torch.Tensor,
        activations: _AttentionActivations,
        context: PassContext,
        need_input_grad: bool,
    ) -> torch.Tensor | None:
        grad_heads = self._backward_output(grad_output, activations, context)
        grads = [grad.view(len(grad_output), -1) for grad in grad_heads]
        if not need_input_grad:
            grad_shrunk = self._qkv.backward_b(grads, activations.shrunk_qkv, context)
            self._qkv.backward_a(activations.normalized, grad_shrunk, context)
            return None
        grad_normalized, grad_shrunk = self._qkv.backward(grads, activations.shrunk_qkv, context)
        self._qkv.backward_a(activations.normalized, grad_shrunk, context)
        return kernels.rms_norm_backward(
            grad_normalized, activations.x, self._norm.weight, activations.inverse_rms, grad_output
        )

    def _backward_output(
        self, grad_output: torch.Tensor, activations: _AttentionActivations, context: PassContext
    ) -> list[torch.Tensor]:
        """Gradients of the outputs of the query, key and value layers."""
        trace = activations.trace
        grad_attention, grad_shrunk = self._output.backward(
            [grad_output], activations.shrunk_output, context
        )
        self._output.backward_a(trace.output.flatten(1), grad_shrunk, context)
        rotation = (context.cos, context.sin) if self._rotary else None
        grads = attention_backward(
            grad_attention.view(trace.output.shape), trace, context.spans, rotation
        )
        del grad_attention
        grad_heads = dict(zip("qkv", grads, strict=True))
        del grads
        for name, norm in activations.head_norms.items():
            grad = grad_heads[name].view(-1, self._head_dim)
            weight = self._head_norms[name].weight
            grad_heads[name] = kernels.rms_norm_backward(grad, norm.x, weight, norm.inverse_rms)
        return list(grad_heads.values())


class _FeedForward:
    """Norm, SwiGLU, and the residual connection around them."""

    def __init__(self, module: Any, name: str, table_rows: dict[str, int]) -> None:
        self._norm = module.post_attention_layernorm
        module_name = f"{name}.mlp"
        gate_up = ("gate_proj", "up_proj")
        self._gate_up = linear_group(module.mlp, module_name, gate_up, table_rows)
        self._down = linear_group(module.mlp, module_name, ("down_proj",), table_rows)

    def forward(
        self, x: torch.Tensor, context: PassContext, recompute: bool
    ) -> tuple[torch.Tensor | None, _FeedForwardActivations]:
        normalized: torch.Tensor | None
        normalized, inverse_rms, residual = kernels.rms_norm(
            x, self._norm.weight, self._norm.variance_epsilon, copy_input=not recompute
        )
        (gate, up), shrunk_gate_up = self._gate_up.forward(normalized, context)
        if shrunk_gate_up is None:
            normalized = None
        output = None
        shrunk_down = None
        if not recompute:
            (output,), shrunk_down = self._down.forward(
                kernels.swiglu(gate, up), context, residual=residual
            )
        elif self._down.is_adapted(context):
            shrunk_down = self._down.shrink(kernels.swiglu(gate, up), context)
        activations = _FeedForwardActivations(
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
        self, grad_output: torch.Tensor, activations: _FeedForwardActivations, context: PassContext
    ) -> torch.Tensor:
        grad_product, grad_shrunk = self._down.backward(
            [grad_output], activations.shrunk_down, context
        )
        product = kernels.swiglu_backward(
            grad_product,
            activations.gate,
            activations.up,
            recompute_output=grad_shrunk is not None,
        )
        self._down.backward_a(product, grad_shrunk, context)
        del grad_product, product
        grads = [activations.gate, activations.up]  # overwritten by their gradients
        grad_normalized, grad_shrunk = self._gate_up.backward(
            grads, activations.shrunk_gate_up, context
        )
        self._gate_up.backward_a(activations.normalized, grad_shrunk, context)
        return kernels.rms_norm_backward(
            grad_normalized, activations.x, self._norm.weight, activations.inverse_rms, grad_output
        )
