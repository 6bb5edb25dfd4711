"""A linear layer of the frozen base, with what the slots' adapters add, each to its own stretch of tokens.

Adapters' gradients go straight into the slots' vectors; autograd sees the layer's input and output alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from finetune.model.quantization import dense_weight


@dataclass(frozen=True)
class Adapter:
    """One layer's adapter in one slot: what it adds is `scaling · B A x`. All are views of the slot's vectors."""

    number: int
    """Among the slot's adapters; its dropout masks are drawn by it."""
    scaling: float
    a: torch.Tensor
    """[rank, in], in the dtype of matrix products"""
    b: torch.Tensor
    """[out, rank]"""
    gradient_a: torch.Tensor
    """float32, as are the weights that the optimizer moves"""
    gradient_b: torch.Tensor

    def row(self) -> list[int]:
        """Its row of the slot's table, by which the kernels find it (`lowrank.COLUMNS`)."""
        addresses = [part.data_ptr() for part in (self.a, self.b, self.gradient_a, self.gradient_b)]
        scaling = int(torch.tensor(self.scaling, dtype=torch.float64).view(torch.int64))
        return [*addresses, len(self.a), self.number, scaling, 0]


@dataclass(frozen=True)
class SlotTokens:
    """A slot's tokens in a layer's input, and its adapter there."""

    seed: int
    """The run's."""
    dropout: float
    adapter: Adapter
    start: int
    stop: int
    draw: int | None

    def dropped(self, x: torch.Tensor) -> torch.Tensor | None:
        """Which of the input's elements are dropped [tokens, in]; None: none.

        Drawn from the run's seed, the batch and the layer alone, so it is the same alone and packed, resumed, and
        when activations are recomputed.
        """
        if self.draw is None or not self.dropout:
            return None
        generator = torch.Generator(x.device)
        generator.manual_seed(((self.seed * 1_000_003 + self.draw) * 4_093 + self.adapter.number) % 2**63)
        # Four elements of 16 bits from each number drawn: drawing is what dropout costs on a CPU.
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
        words.random_(-(2**63), None, generator=generator)
        drawn = words.view(torch.int16)[: x.numel()].view(x.shape)
        return drawn < round(self.dropout * 65536) - 32768

    @property
    def scaling(self) -> float:
        """Of what the adapter adds; kept elements stand for the dropped ones as well."""
        kept = 1.0 if self.draw is None else 1 - self.dropout
        return self.adapter.scaling / kept


class _Adapted(torch.autograd.Function):
    """A frozen linear layer and the adapters of the slots, each on its own stretch of tokens.

    Adapters' gradients are added to the slots'; autograd sees the input alone. Where the layer's own output is
    given, autograd has its part already.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        anchor: torch.Tensor,
        output: torch.Tensor | None,
        layer: torch.nn.Module,
        stretches: list[SlotTokens],
    ) -> torch.Tensor:
        ctx.layer, ctx.stretches, ctx.computes = layer, stretches, output is None
        y = linear(x, dense_weight(layer), getattr(layer, "bias", None)) if output is None else output.clone()
        flat_x, flat_y = x.flatten(0, -2), y.flatten(0, -2)
        kept: list[torch.Tensor | None] = []
        for stretch in stretches:
            tokens = slice(stretch.start, stretch.stop)
            own = flat_x[tokens]
            dropped = stretch.dropped(own)
            h = _without(own, dropped) @ stretch.adapter.a.t()
            flat_y[tokens].addmm_(h, stretch.adapter.b.t(), alpha=stretch.scaling)
            kept += [h, dropped]
        ctx.save_for_backward(x, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        x, *kept = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0]
        into_x = None
        if wanted:
            into_x = gradient @ dense_weight(ctx.layer) if ctx.computes else torch.zeros_like(x)
        flat_x, flat_y = x.flatten(0, -2), gradient.flatten(0, -2)
        for stretch, h, dropped in zip(ctx.stretches, kept[::2], kept[1::2], strict=True):
            tokens, adapter = slice(stretch.start, stretch.stop), stretch.adapter
            own, slope = flat_x[tokens], flat_y[tokens]
            into_h = (slope @ adapter.b) * stretch.scaling
            _add(adapter.gradient_b, slope.t(), h, stretch.scaling)
            _add(adapter.gradient_a, into_h.t(), _without(own, dropped), 1.0)
            if into_x is not None:
                part = into_x.flatten(0, -2)[tokens]
                if dropped is None:
                    part.addmm_(into_h, adapter.a)
                else:
                    part.add_(_without(into_h @ adapter.a, dropped))
        return into_x, None, None if ctx.computes else gradient, None, None


lora_linear: Callable[..., torch.Tensor] = _Adapted.apply


def _without(x: torch.Tensor, dropped: torch.Tensor | None) -> torch.Tensor:
    return x if dropped is None else x.masked_fill(dropped, 0.0)


def _add(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    """Add a product to a float32 gradient."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        total.add_(left @ right, alpha=scale)
