"""Adapters as PEFT initialises them, on copies of the base without weights."""

import copy
from typing import TYPE_CHECKING

import torch

from finetune.config.sections.lora import LoraSettings
from finetune.engine.packed.dora import set_magnitudes
from finetune.model.adapter_templates import AdapterTemplates
from finetune.model.initial_adapter import load_initial_adapter
from finetune.model.origin import share_origin

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class FreshAdapters:
    """Creates the adapters of the runs on a base."""

    def __init__(self, base: "PreTrainedModel", shares_weights: bool) -> None:
        """Create no adapter yet.

        Args:
            base: The base, before a pass has changed its config.
            shares_weights: See `AdapterTemplates`.
        """
        self._base = base
        # A copy, because a pass changes the base's own config while it lasts.
        self._base_config = copy.deepcopy(base.config)
        self._templates = AdapterTemplates(self._skeleton, shares_weights)

    def create(self, lora: LoraSettings, seed: int) -> "PeftModel":
        """Initialise an adapter exactly as PEFT does on the real base.

        Args:
            lora: The adapter's settings.
            seed: Seed of the random initialisation.

        Returns:
            The adapter on a copy of the base without weights.
        """
        model = self._templates.create(lora, seed)
        share_origin(self._base, model.get_base_model())
        if lora.use_dora:
            set_magnitudes(model, self._base)
        load_initial_adapter(model, lora)
        return model

    def take_back(self, model: "PeftModel") -> None:
        """Let a later adapter reuse the modules of one that nobody uses any more."""
        self._templates.take_back(model)

    def _skeleton(self) -> "PreTrainedModel":
        """A model of the base's shapes that takes next to no memory."""
        config = copy.deepcopy(self._base_config)
        with torch.device("meta"):
            skeleton: PreTrainedModel = type(self._base)(config)
        for name, module in skeleton.named_modules():
            if isinstance(module, torch.nn.Linear):
                # PEFT initialises the adapter on the device of the layer's weight, which must not
                # be meta. An expanded tensor has the shape, and memory for one element.
                one_element = torch.zeros(1, 1).expand(module.weight.shape)
                module.weight = torch.nn.Parameter(one_element, requires_grad=False)
                if module.bias is not None:
                    # A slot may train it.
                    bias = self._base.get_submodule(name).bias
                    copied = bias.detach().to("cpu", torch.float32, copy=True)
                    module.bias = torch.nn.Parameter(copied, requires_grad=False)
        return skeleton
