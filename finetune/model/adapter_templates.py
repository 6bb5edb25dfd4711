"""Adapters of many runs on models of the same layers, copied from one that PEFT has made.

PEFT takes 0.2 s of Python to adapt 200 layers, and no other thread goes on meanwhile. Adapters of
the same layers differ in rank, scaling, dropout and weights alone. A copy to which these are given
takes a fifth of the time.
"""

import dataclasses
import io
import logging
import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from finetune.config.sections.lora import LoraSettings
from finetune.console import summary_line
from finetune.model.adapter import add_adapter, seeded
from finetune.model.lora_config import lora_config

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel


log = logging.getLogger(__name__)


class AdapterTemplates:
    """Creates fresh adapters on copies of a model without weights, as `add_adapter` does."""

    def __init__(self, create_skeleton: "Callable[[], PreTrainedModel]") -> None:
        """Create no template yet.

        Args:
            create_skeleton: Returns a new model whose frozen weights may be shared.
        """
        self._create_skeleton = create_skeleton
        self._templates: dict[object, _Template | None] = {}
        """By what a template's adapters have in common; None: it can't be copied."""

    def create(self, lora: LoraSettings, seed: int) -> "PeftModel":
        """Create an adapter.

        Args:
            lora: The adapter's settings.
            seed: Seed of its initial weights.
        """
        template = self._template(lora) if _is_plain(lora) else None
        if template is None:
            return add_adapter(self._create_skeleton(), lora, seed)
        return template.create(lora, seed)

    def _template(self, lora: LoraSettings) -> "_Template | None":
        key = repr(lora.target_modules), lora.use_rslora, lora.init_lora_weights
        if key not in self._templates:
            self._templates[key] = self._make_template(lora)
        return self._templates[key]

    def _make_template(self, lora: LoraSettings) -> "_Template | None":
        from peft.tuners.lora import Linear, LoraLayer

        # Of rank 1, because its weights stay in memory.
        smallest = dataclasses.replace(lora, r=1)
        model = add_adapter(self._create_skeleton(), smallest, seed=0)
        layers = [each for each in model.modules() if isinstance(each, LoraLayer)]
        # PEFT draws those of experts in another way.
        if not all(isinstance(layer, Linear) for layer in layers):
            return None
        try:
            template = _Template(model, layers)
            template.create(lora, seed=0)
        # A base's code may have given its modules what can't be pickled: whatever it raises.
        except Exception as error:
            log.debug("adapters are not copied: %s", summary_line(error))
            return None
        return template


def _is_plain(lora: LoraSettings) -> bool:
    """Whether adapters of the same layers differ only in what `_Template.create` sets."""
    return (
        lora.init_lora_weights in (True, False, "gaussian")
        and lora.bias == "none"
        and not lora.use_dora
        and not lora.extra
    )


class _Template:
    """An adapted model that is copied. Copies share its frozen weights."""

    def __init__(self, model: "PeftModel", layers: "list[LoraLayer]") -> None:
        """Pickle a model in memory: it is copied six times faster than by `deepcopy`.

        Args:
            model: The adapter on a model without weights.
            layers: Its adapted layers, in the order in which PEFT draws their weights.

        Raises:
            Exception: It holds something that can't be pickled.
        """
        stream = io.BytesIO()
        pickler = _TensorPickler(stream, pickle.HIGHEST_PROTOCOL)
        pickler.dump((model, layers))
        self._pickled = stream.getvalue()
        self._tensors = pickler.tensors

    def create(self, lora: LoraSettings, seed: int) -> "PeftModel":
        """Copy the model, and draw its adapter in PEFT's order: layer by layer."""
        unpickler = _TensorUnpickler(io.BytesIO(self._pickled))
        unpickler.tensors = self._tensors
        model: PeftModel
        layers: list[LoraLayer]
        model, layers = unpickler.load()
        settings = lora_config(lora)
        config = model.peft_config["default"]
        config.r = settings.r
        config.lora_alpha = settings.lora_alpha
        config.lora_dropout = settings.lora_dropout
        sizes = []
        for layer in layers:
            sizes += [layer.in_features * config.r, layer.out_features * config.r]
        # One vector, which a slot need not put together.
        pieces = iter(torch.empty(sum(sizes), dtype=torch.float32).split(sizes))
        with seeded(seed):
            for layer in layers:
                _initialise(layer, settings, next(pieces), next(pieces))
        return model


def _initialise(
    layer: "LoraLayer", config: "LoraConfig", a: torch.Tensor, b: torch.Tensor
) -> None:
    """Give a layer a fresh adapter, as PEFT's `update_layer` does.

    Args:
        layer: Has an adapter of another rank.
        config: The adapter's settings.
        a: Memory of A's weights [rank · in_features].
        b: Memory of B's weights [out_features · rank].
    """
    dropout = config.lora_dropout
    layer.r["default"] = config.r
    layer.lora_alpha["default"] = config.lora_alpha
    layer.set_scale("default", 1)
    layer.lora_dropout["default"] = (
        torch.nn.Dropout(dropout) if dropout else torch.nn.Identity()
    )
    down, up = layer.lora_A["default"], layer.lora_B["default"]
    down.out_features = up.in_features = config.r
    down.weight = torch.nn.Parameter(a.view(config.r, layer.in_features))
    up.weight = torch.nn.Parameter(b.view(layer.out_features, config.r))
    # Both are drawn, and then drawn again or set to zero: the same seed gives PEFT's weights.
    down.reset_parameters()
    up.reset_parameters()
    layer.reset_lora_parameters("default", config.init_lora_weights)


class _TensorPickler(pickle.Pickler):
    """Pickles a number in place of each tensor."""

    def __init__(self, stream: io.BytesIO, protocol: int) -> None:
        super().__init__(stream, protocol)
        self.tensors: list[torch.Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, torch.Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class _TensorUnpickler(pickle.Unpickler):
    """Puts the tensors back."""

    tensors: list[torch.Tensor]

    def persistent_load(self, number: int) -> torch.Tensor:
        return self.tensors[number]
