"""Which layers of a base get an adapter: `lora.target_modules` beside what the base has."""

import logging
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from transformers.pytorch_utils import Conv1D

from finetune.compat import peft_names_of_experts, peft_refuses_layer
from finetune.config.sections.lora import LoraSettings
from finetune.config.sections.model import ModelSettings
from finetune.errors import refusal
from finetune.model.architectures import PASSED_OVER, text_config_of
from finetune.model.base_config import read_base_config
from finetune.model.experts import expert_modules, router_layers, weight_names
from finetune.model.loading import skeleton_of
from finetune.model.lora_config import lora_config
from finetune.model.source import BaseSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def check_targets(source: BaseSource, model: ModelSettings, lora: LoraSettings) -> None:
    """Check `lora.target_modules` against the base's layers, before its weights are loaded.

    Also checked is `lora.extra.target_parameters`, for adapters on experts.

    Raises:
        ConfigError: A target matches no linear layer of the base's language model, or one that PEFT
            or both engines can't train.
    """
    targets = lora.target_modules
    parameters = lora.extra.get("target_parameters") or []
    if targets == "all-linear" and not parameters:
        return
    skeleton = skeleton_of(read_base_config(source, model), model)
    _check_parameters(parameters, skeleton, lora)
    if targets == "all-linear":
        return
    refused = _untrainable_layers(skeleton, lora)
    names = _linear_layers(skeleton)
    trainable = {_last_part(name) for name in names - refused.keys()}
    allowed = ", ".join(sorted(trainable))
    # As PEFT matches them: a string is a pattern for whole names, the items of a list are the ends
    # of names.
    if isinstance(targets, str):
        patterns = {targets: targets}
    else:
        patterns = {target: rf"(.*\.)?{re.escape(target)}" for target in targets}
    for target, pattern in patterns.items():
        try:
            matching = [name for name in names if re.fullmatch(pattern, name)]
        except re.error as error:
            reason = f"is no regular expression ({error}); allowed: a list of {allowed}"
            raise refusal("lora.target_modules", target, reason) from None
        if not matching:
            reason = f"matches no linear layer; allowed: {allowed}"
            raise refusal("lora.target_modules", target, reason)
        for name in matching:
            if name in refused:
                reason = f"{refused[name]}; allowed: {allowed}"
                raise refusal("lora.target_modules", target, reason)


def _check_parameters(
    targets: Sequence[str], skeleton: "PreTrainedModel", lora: LoraSettings
) -> None:
    """Refuse targets that are no weights of experts, and a dropout, which PEFT can't compute."""
    key = "lora.extra.target_parameters"
    weights = {
        f"{module_name}.{name}"
        for module_name, experts in expert_modules(skeleton).items()
        for name in weight_names(experts)
    }
    # As PEFT matches them, but for the numbers of layers.
    ends = {".".join(weight.rsplit(".", 3)[1:]) for weight in weights}
    allowed = ", ".join(sorted(ends)) or "none, as the base has no experts"
    for target in targets:
        if not any(f".{weight}".endswith(f".{target}") for weight in weights):
            reason = f"matches no weight of experts; allowed: {allowed}"
            raise refusal(key, target, reason)
    if targets and lora.dropout:
        reason = f"must be 0 with adapters on experts ({key})"
        raise refusal("lora.dropout", lora.dropout, reason)


def excluded_modules(model: "PreTrainedModel", lora: LoraSettings) -> list[str]:
    """Return patterns of the modules that get no adapter, and log which they are."""
    patterns = []
    outside = modules_outside_language_model(model)
    if outside:
        names = ", ".join(outside)
        log.info("lora: the language model gets the adapter; without: %s", names)
        alternatives = "|".join(map(re.escape, outside))
        patterns.append(rf"({alternatives})(\..*)?")
    # Layers that the config names itself are refused by `check_targets` instead.
    if lora.target_modules == "all-linear":
        layers = _layers_without_adapter(model, lora)
        for reason in sorted(set(layers.values())):
            ends = {_last_part(name) for name in layers if layers[name] == reason}
            log.info(
                "lora.target_modules=all-linear: without %s, %s",
                ", ".join(sorted(ends)),
                reason,
            )
        if layers:
            patterns.append(expression_of({_last_part(name) for name in layers}))
    return patterns


def expression_of(ends: Iterable[str]) -> str:
    """Return a regular expression of the modules whose names end so, as PEFT excludes them."""
    return rf"(.*\.)?({'|'.join(map(re.escape, sorted(ends)))})"


def modules_outside_language_model(model: "PreTrainedModel") -> list[str]:
    """Return the names of the modules that belong neither to the language model nor to its head.

    In a model of text and images these are the vision tower and the projection of its output.
    Submodules of a listed module are not listed. Empty for a model of text alone.
    """
    if text_config_of(model.config) is model.config:
        return []
    decoder = model.get_decoder()
    head = model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    decoder_name = names[decoder]
    outside: list[str] = []
    for name, module in model.named_modules():
        # The root has an empty name and contains everything.
        contains_decoder = not name or _is_inside(decoder_name, [name])
        if module is head or contains_decoder:
            continue
        # Parents come before their submodules, so a listed one hides all that is in it.
        if not _is_inside(name, [decoder_name, *outside]):
            outside.append(name)
    return outside


def _is_inside(name: str, modules: Sequence[str]) -> bool:
    """Return whether a module is one of the modules, or a submodule of one."""
    # With a dot behind, or `layers.10` would be inside of `layers.1`.
    prefixes = tuple(f"{module}." for module in modules)
    return f"{name}.".startswith(prefixes)


def _last_part(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _untrainable_layers(model: "PreTrainedModel", lora: LoraSettings) -> dict[str, str]:
    """Return the linear layers that can't have an adapter, and why, in the words of a message."""
    refused = {}
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head:
            # TRL's loss multiplies by the head's weight directly, tied to the embedding or not.
            reason = "the output layer, whose adapter would not be trained"
            refused[name] = f"matches {name}, {reason}"
    for name, reason in _layers_without_adapter(model, lora).items():
        kind = f"in a base of type {model.config.model_type}"
        refused[name] = f"matches {_last_part(name)}, {reason} {kind}"
    return refused


def _layers_without_adapter(
    model: "PreTrainedModel", lora: LoraSettings
) -> dict[str, str]:
    """Return the linear layers that get no adapter in bases of a model's type, and why."""
    config = lora_config(lora)
    names_of_experts = peft_names_of_experts(model)
    routers = router_layers(model)
    passed_over = PASSED_OVER.get(text_config_of(model.config).model_type, ())
    reasons = {}
    for name in _linear_layers(model):
        last = _last_part(name)
        is_refused = peft_refuses_layer(config, model, last)
        if is_refused or last in names_of_experts or name in routers:
            reasons[name] = "which PEFT can't adapt"
        elif last in passed_over:
            reasons[name] = "whose adapter would not be trained"
    return reasons


def linear_targets(model: "PreTrainedModel", lora: LoraSettings) -> str | list[str]:
    """Return `lora.target_modules` as PEFT must get it to adapt no experts and no routers.

    It is the same, but for `all-linear` and patterns on a base whose experts PEFT would adapt too.
    """
    targets = lora.target_modules
    if not isinstance(targets, str) or not peft_names_of_experts(model):
        return targets
    if targets != "all-linear":
        names = _linear_layers(model)
        return sorted(name for name in names if re.fullmatch(targets, name))
    adapted = names_of_linear_layers(model, lora)
    return sorted({_last_part(name) for name in adapted})


def names_of_linear_layers(model: "PreTrainedModel", lora: LoraSettings) -> list[str]:
    """Return the full names of the layers that `all-linear` adapts."""
    head = model.get_output_embeddings()
    return sorted(
        name
        for name in _linear_layers(model) - _layers_without_adapter(model, lora).keys()
        if model.get_submodule(name) is not head
    )


def _linear_layers(model: "PreTrainedModel") -> set[str]:
    """Return the names of the linear layers of a model's language model, and of its head."""
    outside = modules_outside_language_model(model)
    names = set()
    for name, module in model.named_modules():
        # GPT-2's linear layers are `Conv1D`.
        is_linear = isinstance(module, torch.nn.Linear | Conv1D)
        if is_linear and not _is_inside(name, outside):
            names.add(name)
    return names
