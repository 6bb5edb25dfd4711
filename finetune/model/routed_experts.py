"""How a layer's experts compute the tokens that are routed to them, in place of transformers' code.

Experts in 4 bits are dequantised in the forward pass and again in the backward pass, and nothing
dequantised is kept in between. The experts are frozen; `finetune.model.expert_adapters` adds
adapters to them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

from finetune.compat import gate_of_experts, norm_of_experts
from finetune.model.experts import ExpertWeight, expert_modules, weight_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION = "routed"
"""The name under which this computation is registered with transformers."""


def use_routed_experts(model: "PreTrainedModel") -> None:
    """Let a model compute its experts by `routed_experts`, and return no router logits.

    They are for a loss that trains routers, which are frozen here. Nothing is done to a model
    without such experts.
    """
    if expert_modules(model):
        model.set_experts_implementation(IMPLEMENTATION)
        model.config.get_text_config(decoder=True).output_router_logits = False


@dataclass(frozen=True)
class Routing:
    """Which expert computes which token. A token with k experts is k pairs."""

    counts: list[int]
    """Pairs of each expert."""
    order: torch.Tensor
    """Numbers of the pairs, sorted by their expert [pairs]."""
    inverse: torch.Tensor
    """Place of each pair in `order` [pairs]."""
    experts: torch.Tensor
    """The expert of each pair, sorted [pairs]."""

    @classmethod
    def create(cls, top_k_index: torch.Tensor, experts: int) -> "Routing":
        """Sort pairs by their expert.

        Args:
            top_k_index: The experts of each token [tokens, k].
            experts: Number of experts of the layer.
        """
        sorted_experts, order = torch.sort(top_k_index.flatten(), stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        counts = torch.bincount(sorted_experts, minlength=experts)
        return cls(counts.tolist(), order, inverse, sorted_experts)


def routed_experts(
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Compute a layer's experts, as transformers calls it.

    Args:
        experts: The module that holds them.
        hidden_states: [tokens, hidden].
        top_k_index: The experts of each token [tokens, k].
        top_k_weights: Their weights in the sum [tokens, k].

    Returns:
        The weighted sum of the experts' outputs [tokens, hidden].
    """
    first, last = weight_names(experts)
    # Trained as a whole: its gradient needs PyTorch's own product.
    if getattr(experts, first).requires_grad or getattr(experts, last).requires_grad:
        output: torch.Tensor = grouped_mm_experts_forward(
            experts, hidden_states, top_k_index, top_k_weights
        )
        return output
    tokens, k = top_k_index.shape
    routing = Routing.create(top_k_index, experts.num_experts)
    pair_weights = _permute(top_k_weights.reshape(-1), routing.order, routing.inverse)
    up = _expert_linear(experts, first, _dispatch(hidden_states, k, routing), routing)
    norm = norm_of_experts(experts)
    if norm is not None or _adapter(experts, last) is not None:
        inner = _activated(experts, up)
        output = _expert_linear(experts, last, inner, routing)
        if norm is not None:
            output = norm(output)
        output = output * pair_weights[:, None]
    else:
        output = _weighted_output(up, pair_weights, experts, routing)
    del up
    output = _permute(output, routing.inverse, routing.order)
    return output.view(tokens, k, -1).sum(1).to(hidden_states.dtype)


ExpertsInterface.register(IMPLEMENTATION, routed_experts)


def _dispatch(hidden_states: torch.Tensor, k: int, routing: Routing) -> torch.Tensor:
    """Return the hidden state of each pair, sorted by expert [pairs, hidden]."""
    tokens, hidden = hidden_states.shape
    pairs = hidden_states[:, None].expand(tokens, k, hidden).reshape(-1, hidden)
    rows: torch.Tensor = _permute(pairs, routing.order, routing.inverse)
    return rows


def _activated(experts: Any, up: torch.Tensor) -> torch.Tensor:
    """Apply the experts' activation, gated or not."""
    activation = gate_of_experts(experts) if experts.has_gate else experts.act_fn
    inner: torch.Tensor = activation(up)
    return inner


def _adapter(experts: Any, name: str) -> Any:
    """Return the adapter of one of the weights while it is active (`expert_adapters`)."""
    return getattr(experts, "active_adapters", {}).get(name)


def _expert_linear(
    experts: Any, name: str, rows: torch.Tensor, routing: Routing
) -> torch.Tensor:
    """Multiply the rows of each expert by its matrix, add its bias and its adapter."""
    weight = ExpertWeight(experts, name)
    output: torch.Tensor = _product(rows, weight, routing)
    adapter = _adapter(experts, name)
    return output if adapter is None else output + adapter.apply(rows, routing)


class _Permute(torch.autograd.Function):
    """Args: x [rows, …], order [rows], its inverse [rows]. Returns x in that order."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        (inverse,) = ctx.saved_tensors
        # Without the sum of an index's own gradient, as no row comes twice.
        return grad_outputs[0][inverse], None, None


class _Product(torch.autograd.Function):
    """Args: rows [pairs, in], weight, routing. Returns the products with biases [pairs, out]."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: ExpertWeight, routing: Routing
    ) -> torch.Tensor:
        # Nothing else: frozen weights need no inputs for their gradient.
        ctx.weight, ctx.routing, ctx.dtype = weight, routing, rows.dtype
        output = weight.multiply(rows, routing.counts, backward=False)
        if weight.bias is not None:
            output += weight.bias[routing.experts]
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        gradient = ctx.weight.multiply(
            grad_outputs[0], ctx.routing.counts, backward=True
        )
        return gradient.to(ctx.dtype), None, None


class _WeightedOutput(torch.autograd.Function):
    """Activation, product with the last matrix, and weighting; only the first's input is kept.

    Args: up [pairs, width], pair weights [pairs], experts, routing. Returns [pairs, hidden].
    """

    @staticmethod
    def forward(
        ctx: Any,
        up: torch.Tensor,
        pair_weights: torch.Tensor,
        experts: Any,
        routing: Routing,
    ) -> torch.Tensor:
        ctx.save_for_backward(up, pair_weights)
        ctx.experts, ctx.routing = experts, routing
        weight = ExpertWeight(experts, weight_names(experts)[1])
        output = weight.multiply(
            _activated(experts, up), routing.counts, backward=False
        )
        if weight.bias is not None:
            output += weight.bias[routing.experts]
        return output * pair_weights[:, None]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        (grad_output,) = grad_outputs
        up, pair_weights = ctx.saved_tensors
        experts, routing = ctx.experts, ctx.routing
        weight = ExpertWeight(experts, weight_names(experts)[1])
        with torch.enable_grad():
            up = up.detach().requires_grad_()
            inner = _activated(experts, up)
        # Of the activation, before it is weighted: its product with the activation is the gradient
        # of the pair's weight, for which the output itself is not needed.
        grad_inner = weight.multiply(grad_output, routing.counts, backward=True)
        grad_weights = (grad_inner * inner.detach()).sum(-1)
        if weight.bias is not None:
            grad_weights += (grad_output * weight.bias[routing.experts]).sum(-1)
        grad_inner = grad_inner * pair_weights[:, None]
        (grad_up,) = torch.autograd.grad(inner, up, grad_inner.to(inner.dtype))
        return grad_up, grad_weights.to(pair_weights.dtype), None, None


_permute: Callable[..., torch.Tensor] = _Permute.apply
_product: Callable[..., torch.Tensor] = _Product.apply
_weighted_output: Callable[..., torch.Tensor] = _WeightedOutput.apply
