"""A frozen linear layer plus the LoRA adapters of all slots, as one autograd function.

Each slot's adapter acts on that slot's tokens only. Adapter gradients are added directly to the
slots' gradient vectors; autograd sees only the input and the output of the layer.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from finetune.model.quantization import dense_weight


@dataclass(frozen=True)
class Adapter:
    """One layer's adapter in one slot. It adds `scaling · B A x` to the layer's output.

    The tensors are views of the slot's flat vectors.
    """

    number: int
    """Index among the slot's adapters; part of the seed of its dropout masks."""
    scaling: float
    a: torch.Tensor
    """[rank, in_features], in the dtype of matrix products."""
    b: torch.Tensor
    """[out_features, rank], in the dtype of matrix products."""
    gradient_a: torch.Tensor
    """[rank, in_features], float32 as the weights that the optimizer updates."""
    gradient_b: torch.Tensor
    """[out_features, rank], float32."""
    magnitude: torch.Tensor | None = None
    """Of DoRA, float32 [out_features]; None: plain LoRA."""
    gradient_magnitude: torch.Tensor | None = None
    """[out_features], float32."""
    bias: torch.Tensor | None = None
    """Stands for the layer's bias, float32 [out_features]; None: it is not trained."""
    gradient_bias: torch.Tensor | None = None
    """[out_features], float32."""

    def bias_change(self, layer: torch.nn.Module) -> torch.Tensor:
        """Return what the trained bias adds to the frozen layer's [out_features]."""
        assert self.bias is not None
        assert isinstance(layer.bias, torch.Tensor)
        return self.bias - layer.bias

    def table_row(self) -> list[int]:
        """Describe the adapter to the GPU kernels.

        Returns:
            The `adapter_tables.COLUMNS` integers of the adapter's row in its slot's table.
        """
        tensors = (self.a, self.b, self.gradient_a, self.gradient_b)
        addresses = [tensor.data_ptr() for tensor in tensors]
        rank = len(self.a)
        # The table has integers only: the float's bits are one of them.
        (scaling_bits,) = struct.unpack("q", struct.pack("d", self.scaling))
        return [*addresses, rank, self.number, scaling_bits, 0]


@dataclass(frozen=True)
class SlotTokens:
    """The tokens of one slot in a layer's input, and the slot's adapter of that layer."""

    seed: int
    """The run's seed."""
    dropout: float
    adapter: Adapter
    start: int
    """First token."""
    stop: int
    """One past the last token."""
    dropout_step: int | None
    """Number of the run's batch, part of the seed of its dropout masks; None: no dropout."""
    row: int = 0
    """Number of the row where the layer computes each of the batch's rows by itself, part of the
    seed of its dropout masks."""

    def dropout_mask(self, x: torch.Tensor) -> torch.Tensor | None:
        """Draw which elements of the input are dropped.

        The mask depends only on the run's seed, the batch and the layer. So it is the same whether
        the run trains alone, in a pack, or resumed, and when activations are recomputed.

        Args:
            x: The slot's input of the layer [tokens, in_features].

        Returns:
            True where an element is dropped [tokens, in_features]; None without dropout.
        """
        if self.dropout_step is None or not self.dropout:
            return None
        generator = torch.Generator(x.device)
        # No two masks share a seed while a run has fewer batches and adapters than these factors.
        batch_seed = self.seed * 1_000_003 + self.dropout_step
        layer_seed = batch_seed * 4_093 + self.adapter.number
        row_seed = layer_seed + self.row * 2**47
        # PyTorch takes seeds of at most 64 bits.
        generator.manual_seed(row_seed % 2**63)
        # One 64-bit draw serves four elements: drawing is the main cost of dropout on a CPU.
        word_count = math.ceil(x.numel() / 4)
        words = torch.empty(word_count, dtype=torch.int64, device=x.device)
        words.random_(-(2**63), None, generator=generator)
        elements = words.view(torch.int16)[: x.numel()]
        uniform = elements.view(x.shape)
        # Of 65,536 values; int16 begins at -32,768.
        threshold = round(self.dropout * 65536) - 32768
        return uniform < threshold

    @property
    def scaling(self) -> float:
        """The adapter's scaling, divided by the share of elements that dropout keeps."""
        keep_probability = 1.0 if self.dropout_step is None else 1 - self.dropout
        return self.adapter.scaling / keep_probability


class _LoraLinear(torch.autograd.Function):
    """Args of `lora_linear`, in this order.

    x: The layer's input [..., tokens, in_features].
    anchor: A scalar that requires a gradient, so that the output is part of the graph even where x
        requires none.
    output: The layer's output without adapters, if it is computed already (by an operation that
        autograd differentiates itself); None: it is computed here.
    layer: The frozen linear layer.
    slot_tokens: The slots that have an adapter on the layer, with their tokens.

    Returns the output with the adapters' contributions [..., tokens, out_features].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        anchor: torch.Tensor,
        output: torch.Tensor | None,
        layer: torch.nn.Module,
        slot_tokens: list[SlotTokens],
    ) -> torch.Tensor:
        ctx.layer = layer
        ctx.slot_tokens = slot_tokens
        ctx.computes_base = output is None
        # Cloned, because the adapters' contributions are added in place, and autograd does not
        # expect that an input changes.
        y = _base_output(x, layer) if output is None else output.clone()
        flat_x = x.flatten(0, -2)
        flat_y = y.flatten(0, -2)
        activations: list[torch.Tensor | None] = []
        """Of each slot in turn: the input through A, and the dropout mask."""
        for slot in slot_tokens:
            tokens = slice(slot.start, slot.stop)
            slot_x = flat_x[tokens]
            mask = slot.dropout_mask(slot_x)
            # The masked input is not kept: the backward pass masks the input again.
            shrunk = _drop(slot_x, mask) @ slot.adapter.a.t()
            # In place on a view of y: one output for all slots, without a copy.
            slot_y = flat_y[tokens]
            slot_y.addmm_(shrunk, slot.adapter.b.t(), alpha=slot.scaling)
            if slot.adapter.bias is not None:
                slot_y += slot.adapter.bias_change(layer).to(y.dtype)
            activations += [shrunk, mask]
        # Not as attributes: only tensors that are saved this way can gradient checkpointing drop.
        ctx.save_for_backward(x, *activations)
        return y

    @staticmethod
    def backward(
        ctx: Any, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        (grad_output,) = grad_outputs
        x, *activations = ctx.saved_tensors
        grad_x = None
        # The first layers of a base have an input without a gradient, as embeddings are frozen.
        if ctx.needs_input_grad[0] and ctx.computes_base:
            grad_x = grad_output @ dense_weight(ctx.layer)
        elif ctx.needs_input_grad[0]:
            # Autograd adds the gradient through the base, which another operation has computed.
            grad_x = torch.zeros_like(x)
        flat_x = x.flatten(0, -2)
        flat_grad_output = grad_output.flatten(0, -2)
        flat_grad_x = None if grad_x is None else grad_x.flatten(0, -2)
        all_shrunk = activations[::2]
        masks = activations[1::2]
        for slot, shrunk, mask in zip(
            ctx.slot_tokens,
            all_shrunk,
            masks,
            strict=True,
        ):
            tokens = slice(slot.start, slot.stop)
            adapter = slot.adapter
            slot_grad = flat_grad_output[tokens]
            if adapter.gradient_bias is not None:
                adapter.gradient_bias.add_(slot_grad.sum(0, dtype=torch.float32))
            # Scaled here, where it has only as many columns as the rank.
            grad_shrunk = (slot_grad @ adapter.b) * slot.scaling
            _add_product(
                adapter.gradient_b,
                slot_grad.t(),
                shrunk,
                slot.scaling,
            )
            slot_x = _drop(flat_x[tokens], mask)
            _add_product(
                adapter.gradient_a,
                grad_shrunk.t(),
                slot_x,
                1.0,
            )
            # With dropout it is a copy.
            del slot_x
            if flat_grad_x is not None:
                _add_input_gradient(
                    flat_grad_x[tokens],
                    grad_shrunk,
                    adapter.a,
                    mask,
                )
        grad_base = None if ctx.computes_base else grad_output
        return grad_x, None, grad_base, None, None


lora_linear: Callable[..., torch.Tensor] = _LoraLinear.apply


def _base_output(x: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
    return linear(x, dense_weight(layer), getattr(layer, "bias", None))


def _drop(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return x if mask is None else x.masked_fill(mask, 0.0)


def _add_product(
    total: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: float,
) -> None:
    """Add `scale · left @ right` to a float32 gradient."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        # `addmm_` does not mix dtypes.
        total.add_(left @ right, alpha=scale)


def _add_input_gradient(
    grad_x: torch.Tensor,
    grad_shrunk: torch.Tensor,
    a: torch.Tensor,
    mask: torch.Tensor | None,
) -> None:
    """Add the gradient through A to that of the input."""
    if mask is None:
        grad_x.addmm_(grad_shrunk, a)
    else:
        grad_x.add_(_drop(grad_shrunk @ a, mask))
