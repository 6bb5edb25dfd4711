"""The adapters of several slots on rows that text is generated for: equally many of each slot."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear, pad

from finetune.engine.packed.dora import row_norms
from finetune.engine.packed.lora_linear import Adapter
from finetune.model.quantization import dense_weight

if TYPE_CHECKING:
    from finetune.engine.packed.slot import Slot

_Stack = tuple[torch.Tensor, torch.Tensor]


class RowAdapters:
    """Stacks each layer's adapters, so that two products compute those of all slots.

    A slot's numbers never enter those of another: each product is a batch of one for each slot.
    """

    def __init__(self, slots: "Sequence[Slot]") -> None:
        """Take the adapters as they are now.

        Args:
            slots: The rows are one slot's after another's, in this order.
        """
        self._slots = slots
        self._stacks: dict[str, _Stack | None] = {}
        """By layer, from its first call on: A of all slots [slots, in_features, rank], and B with
        the scaling [slots, rank, out_features]; None where no slot adapts the layer."""
        self._beyond_lora = [
            (number, slot) for number, slot in enumerate(slots) if slot.is_beyond_lora
        ]
        """The slots that train more than A and B, with their numbers."""
        self._scales: dict[tuple[int, int], torch.Tensor] = {}
        """By layer and adapter with magnitudes, what the output is multiplied by [out_features]."""

    def forward(
        self,
        name: str,
        layer: torch.nn.Module,
        x: torch.Tensor,
        separate: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> torch.Tensor:
        """Compute a linear layer with the slots' adapters.

        Args:
            name: The layer's full name in the base.
            layer: The frozen layer.
            x: Its input [rows, tokens, in_features], or the same flattened.
            separate: Computes the layer on each slot's rows by themselves; None: the layer computes
                each row without regard to the others.

        Returns:
            The output [rows, tokens, out_features], or the same flattened.
        """
        count = len(self._slots)
        if separate is not None:
            y = torch.cat([separate(slot_x) for slot_x in x.chunk(count)])
        else:
            y = linear(x, dense_weight(layer), getattr(layer, "bias", None))
        if name not in self._stacks:
            self._stacks[name] = self._stack(name, x.device)
        stack = self._stacks[name]
        if stack is None:
            return y
        a, b = stack
        slot_x = x.reshape(count, -1, x.shape[-1])
        slot_y = y.view(count, -1, y.shape[-1])
        slot_y.baddbmm_(torch.bmm(slot_x, a), b)
        for number, slot in self._beyond_lora:
            adapter = slot.adapters.get(name)
            if adapter is not None and adapter.magnitude is not None:
                self._scale(layer, slot_y[number], adapter)
            if adapter is not None and adapter.bias is not None:
                slot_y[number] += adapter.bias_change(layer).to(y.dtype)
        return y

    def _scale(self, layer: torch.nn.Module, y: torch.Tensor, adapter: Adapter) -> None:
        """Scale the rows of a layer's weight to the lengths of DoRA, in its output.

        Args:
            layer: The frozen layer.
            y: A slot's output with its adapter [tokens, out_features]; overwritten.
            adapter: The slot's adapter of the layer.
        """
        key = (id(layer), id(adapter))
        if key not in self._scales:
            assert adapter.magnitude is not None
            weight = dense_weight(layer)
            norms = row_norms(weight, adapter.a, adapter.b, adapter.scaling)
            self._scales[key] = (adapter.magnitude / norms.float()).to(y.dtype)
        bias = getattr(layer, "bias", None)
        if bias is not None:
            y -= bias
        y *= self._scales[key]
        if bias is not None:
            y += bias

    def _stack(self, name: str, device: torch.device) -> _Stack | None:
        """Stack the adapters of a layer on its device; slots may have them on others."""
        adapters = [slot.adapters.get(name) for slot in self._slots]
        present = [adapter for adapter in adapters if adapter is not None]
        if not present:
            return None
        rank = max(len(adapter.a) for adapter in present)
        stacked_a = []
        stacked_b = []
        for adapter in adapters:
            if adapter is None:
                # Not another slot's numbers times 0: they may be NaN.
                a = torch.zeros_like(present[0].a, device=device)
                scaled_b = torch.zeros_like(present[0].b, device=device)
            else:
                a = adapter.a.to(device)
                scaled_b = adapter.b.to(device) * adapter.scaling
            missing = rank - len(a)
            stacked_a.append(pad(a.t(), (0, missing)))
            stacked_b.append(pad(scaled_b.t(), (0, 0, 0, missing)))
        return torch.stack(stacked_a), torch.stack(stacked_b)
