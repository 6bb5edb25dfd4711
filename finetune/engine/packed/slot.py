"""A slot: one place on the bank where one run trains, with its adapter stored as flat vectors."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from finetune.compat import views_like
from finetune.config.sections.lora import LoraSettings
from finetune.engine.packed.lora_linear import Adapter
from finetune.engine.packed.slot_sections import Section, make_sections
from finetune.engine.steps import Executor
from finetune.model.device import HostCopy, copy_stream_after, to_device
from finetune.model.flat_weights import flatten_weights, separate_views
from finetune.model.layer_devices import layer_device

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel

    from finetune.engine.packed.gpu.adapter_tables import SlotTable


class SlotBank(Executor, Protocol):
    """What a slot needs of its bank."""

    device: torch.device
    """Of the embedding."""
    dtype: torch.dtype
    """Of matrix products."""
    base: "PreTrainedModel"
    shares_prefixes: bool
    """Whether a common prefix of a batch's rows is computed once."""
    is_asynchronous: bool
    """Whether passes are queued, and computed while the host goes on."""


class Slot:
    """One run's adapter on the bank, as flat float32 vectors.

    The optimizer updates `vector`; each pass writes `gradient`. `adapters` are views of the same
    memory, one for each adapted layer. Where matrix products have another dtype, or a layer is on
    another GPU, they read a copy of the weights that `refresh_weights` makes.
    """

    def __init__(
        self,
        bank: SlotBank,
        lora: LoraSettings,
        seed: int,
        model: "PeftModel",
        device: torch.device | None = None,
    ) -> None:
        """Copy a fresh adapter to its device.

        Args:
            bank: The bank that the slot is on.
            lora: The adapter's settings.
            seed: The run's seed.
            model: The adapter as PEFT has it, on a base without weights. It stays usable for
                saving and loading, because its weights become views of the slot's vector.
            device: Computes all layers for the slot; None: each layer is computed where it is.
        """
        self.bank = bank
        self.dropout = lora.dropout
        self.seed = seed
        self.model = model
        layers = _lora_layers(model)
        self.parameters: list[torch.nn.Parameter] = []
        """The model's trained weights, layer by layer; views of `vector`."""
        devices = []
        for name, layer in layers.items():
            trained = _trained_parameters(layer)
            self.parameters += trained
            devices += [device or layer_device(bank.base, name)] * len(trained)
        self.is_on_one_device = device is not None
        """Whether one device computes all layers for the slot, wherever their weights are."""
        self.device = device or bank.device
        """Has the vector, and so the optimizer's state."""
        # One vector: the norm of the gradient, the update and a copy to the host are one operation
        # each, however many layers there are.
        self.vector = to_device(flatten_weights(self.parameters), self.device)
        """All adapter weights [parameters], float32."""
        if self.vector.data_ptr() == self.parameters[0].data_ptr():
            # Other slots may begin with the same memory.
            self.vector = self.vector.clone()
        self.gradient = torch.zeros_like(self.vector)
        """Gradient of the last batch [parameters], float32."""
        self._sections = make_sections(
            self.vector,
            self.gradient,
            bank.dtype,
            parameters=self.parameters,
            devices=devices,
            slot_device=self.device,
        )
        self._views = views_like(self.vector, self.parameters)
        """Of `vector`, in the shape of each parameter."""
        self.adapters = self._adapter_views(layers)
        """The adapters by the name of their layer."""
        self.kernel_table: SlotTable | None = None
        """The adapters' addresses for the GPU kernels; set by `Decoder.attach`."""
        self._bind_model(self._views)

    def _adapter_views(self, layers: dict[str, "LoraLayer"]) -> dict[str, Adapter]:
        # In the order of `parameters`.
        weights = self._section_views(lambda section: section.weights)
        exact_weights = iter(self._views)
        gradients = self._section_views(lambda section: section.gradient)
        adapters = {}
        for number, (name, layer) in enumerate(layers.items()):
            adapter = Adapter(
                number=number,
                # PEFT's own figure, which follows `use_rslora`.
                scaling=float(layer.scaling["default"]),
                a=next(weights),
                b=next(weights),
                gradient_a=next(gradients),
                gradient_b=next(gradients),
            )
            next(exact_weights), next(exact_weights)
            if layer.lora_magnitude_vector:
                next(weights)
                adapter = dataclasses.replace(
                    adapter,
                    magnitude=next(exact_weights),
                    gradient_magnitude=next(gradients),
                )
            if _trained_bias(layer) is not None:
                next(weights)
                adapter = dataclasses.replace(
                    adapter, bias=next(exact_weights), gradient_bias=next(gradients)
                )
            adapters[name] = adapter
        return adapters

    def _section_views(
        self, tensor: Callable[[Section], torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        """Views of a tensor of each section, in the shape of each parameter."""
        for section in self._sections:
            yield from views_like(tensor(section), section.parameters)

    def _bind_model(self, weights: Sequence[torch.Tensor]) -> None:
        """Give each of the model's parameters its weights."""
        for parameter, values in zip(self.parameters, weights, strict=True):
            parameter.data = values

    @property
    def is_beyond_lora(self) -> bool:
        """Whether more than A and B is trained: magnitudes (DoRA) or biases."""
        return any(
            adapter.magnitude is not None or adapter.bias is not None
            for adapter in self.adapters.values()
        )

    @contextlib.contextmanager
    def weights_on_cpu(self, event: "torch.cuda.Event | None") -> Iterator[None]:
        """Point the model at a copy of its weights in host memory, for example to save it.

        The copy waits only for the GPU work that was queued before the event, not for the passes
        of other slots that were queued later.

        Args:
            event: Recorded after the last update of the weights; None on a CPU.
        """
        with copy_stream_after(event):
            copy = HostCopy(self.vector)
        self._bind_model(separate_views(copy.read(), self.parameters))
        try:
            yield
        finally:
            self._bind_model(self._views)

    def release_weights(self) -> None:
        """Let the model, which may live on, have no part of the slot's memory."""
        nothing = torch.empty(0)
        self._bind_model([nothing] * len(self.parameters))

    def refresh_weights(self) -> None:
        """Copy the weights to where products read them, in the dtype of products."""
        # In place, because the adapters' views and the kernels' addresses are of this memory.
        for section in self._sections:
            if section.copies_weights:
                section.weights.copy_(self.vector[section.span])

    def collect_gradient(self) -> None:
        """Complete `gradient` with those of layers on other GPUs."""
        for section in self._sections:
            if section.copies_gradient:
                self.gradient[section.span].copy_(section.gradient)

    def zero_gradient(self) -> None:
        """Set the gradients to zero, where a pass adds to them."""
        for section in self._sections:
            section.gradient.zero_()


def _lora_layers(model: "PeftModel") -> dict[str, "LoraLayer"]:
    # Late, as PEFT imports bitsandbytes: `require_bitsandbytes` must be able to refuse it first.
    from peft.tuners.lora import LoraLayer

    # `base_model.model` is the base itself, so the names are those of its layers.
    modules = model.base_model.model.named_modules()
    return {name: module for name, module in modules if isinstance(module, LoraLayer)}


def _trained_parameters(layer: "LoraLayer") -> list[torch.nn.Parameter]:
    """The weights of A and B of a layer, then its magnitudes and its trained bias."""
    parameters = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    if layer.lora_magnitude_vector:
        parameters.append(layer.lora_magnitude_vector["default"].weight)
    bias = _trained_bias(layer)
    if bias is not None:
        parameters.append(bias)
    return parameters


def _trained_bias(layer: "LoraLayer") -> torch.nn.Parameter | None:
    """The bias of an adapted layer, if it is trained (`lora.bias=lora_only`)."""
    bias: torch.nn.Parameter | None = getattr(layer.get_base_layer(), "bias", None)
    return bias if bias is not None and bias.requires_grad else None
