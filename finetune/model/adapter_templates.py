"""Adapters of many runs on models of the same layers, copied from one that PEFT has made.

PEFT takes 0.2 s of Python to adapt 200 layers, and no other thread goes on meanwhile. Adapters of
the same layers differ in rank, scaling, dropout and weights alone. A copy to which these are given
takes a fifth of the time, and less if the copy of a run that has ended is taken again. The trials
of a study have the same seed, so that its weights need not be drawn again for each of them either.
"""

import dataclasses
import io
import logging
import pickle
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from finetune.config.sections.lora import LoraSettings
from finetune.console import summary_line
from finetune.model.adapter import add_adapter, seeded
from finetune.model.device import on_gpu
from finetune.model.lora_config import lora_config

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel

    _Copy = tuple[PeftModel, list[LoraLayer]]
    """An adapted model, and its adapted layers in the order in which PEFT draws their weights."""


log = logging.getLogger(__name__)


SHARED_BYTES = 256 * 2**20
"""Most bytes of drawn weights that are kept for later adapters."""


class AdapterTemplates:
    """Creates fresh adapters on copies of a model without weights, as `add_adapter` does."""

    def __init__(
        self,
        create_skeleton: "Callable[[], PreTrainedModel]",
        shares_weights: bool = False,
    ) -> None:
        """Create no template yet.

        Args:
            create_skeleton: Returns a new model whose frozen weights may be shared.
            shares_weights: Whether adapters that begin with the same weights share their memory, so
                that they are drawn once for all trials of a study. These weights may not be changed
                in place: a slot on a GPU trains a copy.
        """
        self._create_skeleton = create_skeleton
        self._shares_weights = shares_weights
        self._templates: dict[object, _Template | None] = {}
        """By what a template's adapters have in common; None: it can't be copied."""
        self._lent: WeakKeyDictionary[PeftModel, tuple[_Template, list[LoraLayer]]]
        self._lent = WeakKeyDictionary()
        """Of each copy that is in use its template and its adapted layers."""
        self._unused: list[tuple[_Template, _Copy]] = []
        """Copies that were given back, with their templates; the oldest first."""
        self._most_in_use = 0
        """The most copies that were in use at once: there are never more in all."""
        self._lock = threading.Lock()
        """Held while a copy is taken or given back, as another thread creates adapters."""
        self._drawn: dict[object, torch.Tensor] = {}
        """Drawn weights that are shared, by all that they depend on, the oldest first."""

    def create(self, lora: LoraSettings, seed: int) -> "PeftModel":
        """Create an adapter.

        Args:
            lora: The adapter's settings.
            seed: Seed of its initial weights.
        """
        template = self._template(lora) if _is_plain(lora) else None
        if template is None:
            return add_adapter(self._create_skeleton(), lora, seed)
        model, layers = self._copy(template)
        _configure_model(model, layers, lora)
        key = _template_key(lora), lora.r, seed
        weights = self._drawn.get(key)
        # An adapter that a run goes on from would be loaded over the shared weights.
        if weights is not None and lora.adapter is None:
            _use_weights(layers, lora.r, weights)
        else:
            self._draw(layers, lora, seed, key)
        return model

    def take_back(self, model: "PeftModel") -> None:
        """Let a later adapter reuse the modules of one that nobody uses any more.

        Args:
            model: The adapter; one that is no copy of a template is left as it is.
        """
        with self._lock:
            template, layers = self._lent.pop(model, (None, []))
            if template is not None:
                self._unused.append((template, (model, layers)))

    def _copy(self, template: "_Template") -> "_Copy":
        """Return a copy of a template: one that was given back, or else a new one."""
        with self._lock:
            numbers = [n for n, each in enumerate(self._unused) if each[0] is template]
            given_back = self._unused.pop(numbers[-1])[1] if numbers else None
            in_use = len(self._lent) + 1
            self._most_in_use = max(self._most_in_use, in_use)
            # Those of other templates make room.
            free = self._most_in_use - in_use
            self._unused = self._unused[max(0, len(self._unused) - free) :]
        copy = given_back or template.copy()
        model, layers = copy
        self._lent[model] = template, layers
        return copy

    def _draw(
        self, layers: "list[LoraLayer]", lora: LoraSettings, seed: int, key: object
    ) -> None:
        """Draw the weights of an adapter; they are kept for later ones where these share them."""
        size = sum(_sizes(layers, lora.r))
        is_shared = (
            self._shares_weights
            and lora.adapter is None
            and size * torch.float32.itemsize <= SHARED_BYTES
        )
        # Pinned memory is copied to a GPU while the host goes on.
        is_pinned = is_shared and on_gpu()
        weights = torch.empty(size, dtype=torch.float32, pin_memory=is_pinned)
        _use_weights(layers, lora.r, weights)
        with seeded(seed):
            for layer in layers:
                _draw_layer(layer, lora)
            # Under the lock of `seeded`: no other thread adds or removes any meanwhile.
            if is_shared:
                self._keep(key, weights)

    def _keep(self, key: object, weights: torch.Tensor) -> None:
        """Keep weights for later adapters, in place of the oldest ones if they are too many."""
        self._drawn[key] = weights
        while sum(each.nbytes for each in self._drawn.values()) > SHARED_BYTES:
            del self._drawn[next(iter(self._drawn))]

    def _template(self, lora: LoraSettings) -> "_Template | None":
        key = _template_key(lora)
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
            template.copy()
        # A base's code may have given its modules what can't be pickled: whatever it raises.
        except Exception as error:
            log.debug("adapters are not copied: %s", summary_line(error))
            return None
        return template


def _template_key(lora: LoraSettings) -> object:
    """Return what adapters of a template have in common."""
    return repr(lora.target_modules), lora.use_rslora, lora.init_lora_weights


def _is_plain(lora: LoraSettings) -> bool:
    """Whether adapters of the same layers differ only in what a copy is given."""
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
        pickler = _SharingPickler(stream, _adapted_modules(model, layers))
        pickler.dump((model, layers))
        self._pickled = stream.getvalue()
        self._shared = pickler.shared

    def copy(self) -> "_Copy":
        """Return a new copy of the model, with the template's settings and weights."""
        unpickler = _SharingUnpickler(io.BytesIO(self._pickled))
        unpickler.shared = self._shared
        copy: _Copy = unpickler.load()
        return copy


def _configure_model(
    model: "PeftModel", layers: "list[LoraLayer]", lora: LoraSettings
) -> None:
    """Give a copy the settings of an adapter; its weights are those that it had."""
    settings = lora_config(lora)
    config = model.peft_config["default"]
    config.r = settings.r
    config.lora_alpha = settings.lora_alpha
    config.lora_dropout = settings.lora_dropout
    for layer in layers:
        _configure(layer, settings)


def _configure(layer: "LoraLayer", config: "LoraConfig") -> None:
    """Give a layer the settings of an adapter, as PEFT's `update_layer` does."""
    dropout = config.lora_dropout
    layer.r["default"] = config.r
    layer.lora_alpha["default"] = config.lora_alpha
    layer.set_scale("default", 1)
    layer.lora_dropout["default"] = (
        torch.nn.Dropout(dropout) if dropout else torch.nn.Identity()
    )
    layer.lora_A["default"].out_features = config.r
    layer.lora_B["default"].in_features = config.r


def _sizes(layers: "list[LoraLayer]", rank: int) -> list[int]:
    """Return the numbers of weights of A and B of each layer."""
    sizes = []
    for layer in layers:
        sizes += [rank * layer.in_features, layer.out_features * rank]
    return sizes


def _use_weights(layers: "list[LoraLayer]", rank: int, weights: torch.Tensor) -> None:
    """Make the weights of layers views of one vector, which a slot then has at once."""
    pieces = iter(torch.split(weights, _sizes(layers, rank)))
    for layer in layers:
        a, b = next(pieces).view(rank, -1), next(pieces).view(-1, rank)
        layer.lora_A["default"].weight = torch.nn.Parameter(a)
        layer.lora_B["default"].weight = torch.nn.Parameter(b)


def _draw_layer(layer: "LoraLayer", lora: LoraSettings) -> None:
    """Draw a layer's weights as PEFT does, in place."""
    # Both are drawn, and then drawn again or set to zero: the same seed gives PEFT's weights.
    layer.lora_A["default"].reset_parameters()
    layer.lora_B["default"].reset_parameters()
    layer.reset_lora_parameters("default", lora.init_lora_weights)


class _SharingPickler(pickle.Pickler):
    """Pickles a number in place of each tensor and of each module that no adapter changes."""

    def __init__(self, stream: io.BytesIO, adapted: set[torch.nn.Module]) -> None:
        """Share nothing yet.

        Args:
            stream: Receives what is pickled.
            adapted: The modules that are not shared.
        """
        super().__init__(stream, pickle.HIGHEST_PROTOCOL)
        self._adapted = adapted
        self.shared: list[torch.Tensor | torch.nn.Module] = []

    def persistent_id(self, value: Any) -> int | None:
        is_module = isinstance(value, torch.nn.Module) and value not in self._adapted
        if not is_module and not isinstance(value, torch.Tensor):
            return None
        self.shared.append(value)
        return len(self.shared) - 1


class _SharingUnpickler(pickle.Unpickler):
    """Puts the tensors and modules back."""

    shared: list[torch.Tensor | torch.nn.Module]

    def persistent_load(self, number: int) -> torch.Tensor | torch.nn.Module:
        return self.shared[number]


def _adapted_modules(
    model: "PeftModel", layers: "list[LoraLayer]"
) -> set[torch.nn.Module]:
    """Return the modules that contain an adapter, or are a part of one.

    The others have a third of a model's objects, all of which the garbage collector would visit.
    """
    adapted: set[torch.nn.Module] = set()
    for layer in layers:
        for part in (layer.lora_A, layer.lora_B, layer.lora_dropout):
            adapted.update(part.modules())
    parents = [
        module for module in model.modules() if not adapted.isdisjoint(module.modules())
    ]
    return adapted.union(parents)
