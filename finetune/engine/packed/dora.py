"""DoRA (arXiv 2402.09353): a layer whose adapter also learns the length of each row of the weight.

The layer computes `m / |W + s B A| (W x + s B A x)`; the rows' norms count as constants in the
backward pass. With dropout, what DoRA adds to `W x` has the masked input, as in PEFT.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from finetune.engine.packed.lora_linear import SlotTokens, lora_linear
from finetune.model.quantization import dense_weight

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def row_norms(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Return the norm of each row of a weight with its adapter [out_features].

    Args:
        weight: [out_features, in_features].
        a: [rank, in_features].
        b: [out_features, rank].
        scaling: Of the adapter.
    """
    norms: torch.Tensor = torch.linalg.norm(weight + scaling * (b @ a), dim=1)
    return norms


def set_magnitudes(model: "PeftModel", base: "PreTrainedModel") -> None:
    """Give a fresh adapter the lengths of its base's rows.

    Args:
        model: The adapter on a base without weights.
        base: The base with weights.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in model.base_model.model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        a = layer.lora_A["default"].weight.detach()
        b = layer.lora_B["default"].weight.detach()
        weight = dense_weight(base.get_submodule(name)).to(a.device, a.dtype)
        norms = row_norms(weight, a, b, float(layer.scaling["default"]))
        layer.lora_magnitude_vector["default"].weight.data = norms


def dora_linear(
    x: torch.Tensor,
    anchor: torch.Tensor,
    layer: torch.nn.Module,
    slot_tokens: Sequence[SlotTokens],
) -> torch.Tensor:
    """Compute a linear layer on the tokens of slots of which some have magnitudes.

    Args:
        x: The layer's input [..., tokens, in_features].
        anchor: As of `lora_linear`.
        layer: The frozen linear layer.
        slot_tokens: The slots that have an adapter on the layer, in the order of their tokens.

    Returns:
        The output with the adapters [..., tokens, out_features].
    """
    flat_x = x.flatten(0, -2)
    outputs = []
    position = 0
    plain: list[SlotTokens] = []

    def add_plain(stop: int) -> None:
        """Compute the tokens up to the next slot with magnitudes."""
        if position < stop:
            moved = [_moved(tokens, position) for tokens in plain]
            tokens_x = flat_x[position:stop]
            outputs.append(lora_linear(tokens_x, anchor, None, layer, moved))
        plain.clear()

    for tokens in slot_tokens:
        if tokens.adapter.magnitude is None:
            plain.append(tokens)
            continue
        add_plain(tokens.start)
        slot_x = flat_x[tokens.start : tokens.stop]
        outputs.append(_dora_linear(slot_x, anchor, layer, tokens))
        position = tokens.stop
    add_plain(len(flat_x))
    return torch.cat(outputs).view(*x.shape[:-1], -1)


def _moved(tokens: SlotTokens, offset: int) -> SlotTokens:
    """Return a slot's tokens in an input that begins later."""
    return dataclasses.replace(
        tokens, start=tokens.start - offset, stop=tokens.stop - offset
    )


class _DoraLinear(torch.autograd.Function):
    """Args of `_dora_linear`, in this order: x [tokens, in_features], anchor, layer, slot."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        anchor: torch.Tensor,
        layer: torch.nn.Module,
        slot: SlotTokens,
    ) -> torch.Tensor:
        adapter = slot.adapter
        assert adapter.magnitude is not None
        weight = dense_weight(layer)
        mask = slot.dropout_mask(x)
        masked_x = _masked(x, mask, slot)
        shrunk = masked_x @ adapter.a.t()
        # The base's product without its bias, and the adapter's.
        product = linear(masked_x, weight)
        product.addmm_(shrunk, adapter.b.t(), alpha=adapter.scaling)
        norms = row_norms(weight, adapter.a, adapter.b, adapter.scaling).float()
        scale = (adapter.magnitude / norms).to(x.dtype)
        y = product * scale
        if mask is not None:
            y += linear(x - masked_x, weight)
        bias = getattr(layer, "bias", None)
        if adapter.bias is not None:
            bias = adapter.bias
        if bias is not None:
            y += bias.to(y.dtype)
        ctx.layer, ctx.slot = layer, slot
        ctx.save_for_backward(x, mask, shrunk, product, scale, norms)
        return y

    @staticmethod
    def backward(
        ctx: Any, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        (grad_output,) = grad_outputs
        x, mask, shrunk, product, scale, norms = ctx.saved_tensors
        slot: SlotTokens = ctx.slot
        adapter = slot.adapter
        assert adapter.gradient_magnitude is not None
        if adapter.gradient_bias is not None:
            adapter.gradient_bias.add_(grad_output.sum(0, dtype=torch.float32))
        grad_magnitude = (grad_output * product).sum(0, dtype=torch.float32)
        adapter.gradient_magnitude.add_(grad_magnitude / norms)
        scaled_grad = grad_output * scale
        grad_shrunk = (scaled_grad @ adapter.b) * adapter.scaling
        adapter.gradient_b.add_(scaled_grad.t() @ shrunk, alpha=adapter.scaling)
        adapter.gradient_a.add_(grad_shrunk.t() @ _masked(x, mask, slot))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        weight = dense_weight(ctx.layer)
        if mask is None:
            grad_x = scaled_grad @ weight
            grad_x.addmm_(grad_shrunk, adapter.a)
            return grad_x, None, None, None
        grad_masked = (scaled_grad - grad_output) @ weight
        grad_masked.addmm_(grad_shrunk, adapter.a)
        grad_x = grad_output @ weight + _masked(grad_masked, mask, slot)
        return grad_x, None, None, None


_dora_linear: Callable[..., torch.Tensor] = _DoraLinear.apply


def _masked(
    x: torch.Tensor, mask: torch.Tensor | None, slot: SlotTokens
) -> torch.Tensor:
    """Drop elements, and scale the others up."""
    if mask is None:
        return x
    return x.masked_fill(mask, 0.0) / (1 - slot.dropout)
