"""A slot: one place on the bank where one run trains, with its adapter as flat vectors."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import torch

from finetune.config.schema import LoraSettings
from finetune.engine.packed.lora_linear import Adapter
from finetune.engine.steps import Executor
from finetune.model.device import copy_stream_after, to_device

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class SlotBank(Executor, Protocol):
    """What a slot needs of the bank that it is on."""

    device: torch.device
    dtype: torch.dtype

    def generation_model(self, slot: "Slot") -> AbstractContextManager["PreTrainedModel"]:
        """The base with the slot's adapter, to generate text with."""


class Slot:
    """A place on the bank where one run trains: its adapter, flat, in float32.

    `model` is the adapter as PEFT has it, on a base without weights: to save it, load it and count it.
    """

    def __init__(self, bank: SlotBank, lora: LoraSettings, seed: int, model: "PeftModel") -> None:
        from peft.tuners.lora import LoraLayer

        self.bank, self.dropout, self.seed, self.model = bank, lora.dropout, seed, model
        layers = {
            name: module
            for name, module in self.model.base_model.model.named_modules()
            if isinstance(module, LoraLayer)
        }
        weights = {name: (layer.lora_A["default"], layer.lora_B["default"]) for name, layer in layers.items()}
        drawn = torch.cat([part.weight.data.flatten() for pair in weights.values() for part in pair])
        self.vector = to_device(drawn, bank.device)
        """All weights [parameters]: what the optimizer moves."""
        self.gradient = torch.zeros_like(self.vector)
        """Of the last batch."""
        self._rounded = torch.empty_like(self.vector, dtype=bank.dtype) if bank.dtype != torch.float32 else self.vector
        self.adapters: dict[str, Adapter] = {}
        self._parts: list[tuple[torch.nn.Parameter, slice]] = []
        """The model's weights, and where in the vector they are."""
        offset = 0
        for number, (name, pair) in enumerate(weights.items()):
            views = []
            for part in pair:
                place = slice(offset, offset + part.weight.numel())
                rounded, gradient = (flat[place].view(part.weight.shape) for flat in (self._rounded, self.gradient))
                self._parts.append((part.weight, place))
                views.append((rounded, gradient))
                offset = place.stop
            (a, gradient_a), (b, gradient_b) = views
            scaling = float(layers[name].scaling["default"])
            self.adapters[name] = Adapter(number, scaling, a, b, gradient_a, gradient_b)
        self._point_to(self.vector)
        self.table: torch.Tensor | None = None
        """Where the kernels find the adapters."""

    @contextlib.contextmanager
    def weights_on_cpu(self, mark: "torch.cuda.Event | None") -> Iterator[None]:
        """The model with its weights on the host, as they were when the GPU had done what is before the mark."""
        with copy_stream_after(mark):
            host = self.vector.cpu()
        self._point_to(host)
        try:
            yield
        finally:
            self._point_to(self.vector)

    def _point_to(self, flat: torch.Tensor) -> None:
        """Make the model's weights views of a vector."""
        for weight, place in self._parts:
            weight.data = flat[place].view(weight.shape)

    def round(self) -> None:
        """Take over what has become of the weights, where matrix products have another dtype."""
        if self._rounded is not self.vector:
            self._rounded.copy_(self.vector)
