"""The LoRA adapter: its `LoraConfig`, creation, saving and loading with PEFT.

PEFT is imported only inside functions: it imports bitsandbytes, which initialises CUDA and so fixes
the visible GPUs (see `device.select_gpu`).
"""

import contextlib
import logging
import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D

from finetune.compat import peft_refuses_layer
from finetune.config.sections.lora import LoraSettings
from finetune.config.sections.model import ModelSettings
from finetune.data.encoding import Encoder
from finetune.errors import ConfigError, refusal
from finetune.files.atomic import name_file_in_errors, replace_folder
from finetune.model.architectures import text_config_of
from finetune.model.base_config import read_base_config
from finetune.model.loading import skeleton_of
from finetune.model.origin import (
    generation_config_with_ends,
    public_base_name,
    write_generation_config,
)
from finetune.model.source import BaseSource
from finetune.model.tokenizer import save_tokenizer

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


log = logging.getLogger(__name__)


_SEED_LOCK = threading.Lock()
"""Held while an adapter is initialised: PEFT draws from PyTorch's global generator, which all
threads share."""


def lora_config(settings: LoraSettings) -> "LoraConfig":
    """Return PEFT's config of an adapter.

    Raises:
        ConfigError: `lora.extra` names an argument that has a key of its own, or that LoraConfig
            does not accept.
    """
    from peft import LoraConfig

    alpha = settings.alpha
    arguments: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "r": settings.r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": settings.dropout,
        "target_modules": settings.target_modules,
        "bias": settings.bias,
        "use_rslora": settings.use_rslora,
        "use_dora": settings.use_dora,
        "init_lora_weights": settings.init_lora_weights,
    }
    for name, value in settings.extra.items():
        if name in arguments:
            raise refusal(f"lora.extra.{name}", value, "has a key of its own")
    try:
        return LoraConfig(**arguments | settings.extra)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lora.extra={settings.extra}: {error}") from None


def modules_outside_language_model(model: "PreTrainedModel") -> list[str]:
    """Return the names of the modules that belong neither to the language model nor to its head.

    In a model of text and images these are the vision tower and the projection of its output.
    Submodules of a listed module are not listed. Empty for a model of text alone.
    """
    if text_config_of(model.config) is model.config:
        return []
    decoder = model.get_decoder()
    head = model.get_output_embeddings()
    decoder_name = next(
        name for name, module in model.named_modules() if module is decoder
    )
    outside: list[str] = []
    for name, module in model.named_modules():
        contains_decoder = not name or f"{decoder_name}.".startswith(f"{name}.")
        if (
            module is head
            or contains_decoder
            or _is_inside(name, [decoder_name, *outside])
        ):
            continue
        outside.append(name)
    return outside


def _is_inside(name: str, modules: Sequence[str]) -> bool:
    """Return whether a module is one of the modules, or a submodule of one."""
    return f"{name}.".startswith(tuple(f"{module}." for module in modules))


def check_targets(source: BaseSource, model: ModelSettings, lora: LoraSettings) -> None:
    """Check `lora.target_modules` against the base's layers, before its weights are loaded.

    Raises:
        ConfigError: A target matches no linear layer of the base's language model, or one that PEFT
            or both engines can't train.
    """
    targets = lora.target_modules
    if targets == "all-linear":
        return
    skeleton = skeleton_of(read_base_config(source, model), model)
    refused = _untrainable_layers(skeleton, lora)
    names = _linear_layers(skeleton)
    allowed = ", ".join(sorted({_last_part(name) for name in names - refused.keys()}))
    if isinstance(targets, str):  # PEFT matches a string as a pattern with whole names
        patterns = {targets: targets}
    else:  # and the items of a list with the ends of names
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


def _last_part(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _untrainable_layers(model: "PreTrainedModel", lora: LoraSettings) -> dict[str, str]:
    """Return the linear layers that can't have an adapter, and why, in the words of a message."""
    refused = {}
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head:
            # TRL's loss multiplies by the head's weight directly, tied to the embedding or not.
            refused[name] = (
                f"matches {name}, the output layer, whose adapter would not be trained"
            )
    for name in _layers_refused_by_peft(model, lora):
        reason = f"which PEFT can't adapt in a base of type {model.config.model_type}"
        refused[name] = f"matches {_last_part(name)}, {reason}"
    return refused


def _layers_refused_by_peft(model: "PreTrainedModel", lora: LoraSettings) -> set[str]:
    config = lora_config(lora)
    names = _linear_layers(model)
    return {
        name for name in names if peft_refuses_layer(config, model, _last_part(name))
    }


def _linear_layers(model: "PreTrainedModel") -> set[str]:
    """Return the names of the linear layers of a model's language model, and of its head."""
    outside = modules_outside_language_model(model)
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and not _is_inside(name, outside)
    }


def add_adapter(model: "PreTrainedModel", lora: LoraSettings, seed: int) -> "PeftModel":
    """Add a fresh LoRA adapter in float32 to a base.

    In a model of text and images only the language model gets an adapter, because rows are text
    alone, unless `lora.extra.exclude_modules` says otherwise.

    Args:
        model: The base; its target modules are replaced in place.
        lora: The adapter's settings.
        seed: Seed of the adapter's initial weights.

    Raises:
        ConfigError: PEFT refuses the targets.
    """
    from peft import get_peft_model

    config = lora_config(lora)
    if "exclude_modules" not in lora.extra:
        patterns = _excluded_modules(model, lora)
        config.exclude_modules = "|".join(patterns) or None
    with _SEED_LOCK, without_peft_notes():
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise refusal("lora.target_modules", lora.target_modules, reason) from error


@contextlib.contextmanager
def without_peft_notes() -> Iterator[None]:
    """Hide PEFT's notes on settings that it makes itself, for fused experts and for GPT-2."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        warnings.filterwarnings(
            "ignore", r".*_pattern keys did not match any.*gate_up_proj"
        )
        yield


def _excluded_modules(model: "PreTrainedModel", lora: LoraSettings) -> list[str]:
    """Return patterns of the modules that get no adapter, and log which they are."""
    patterns = []
    outside = modules_outside_language_model(model)
    if outside:
        names = ", ".join(outside)
        log.info("lora: the language model gets the adapter; without: %s", names)
        alternatives = "|".join(map(re.escape, outside))
        patterns.append(rf"({alternatives})(\..*)?")
    if lora.target_modules == "all-linear":
        refused = {_last_part(name) for name in _layers_refused_by_peft(model, lora)}
        if refused:
            names = ", ".join(sorted(refused))
            log.info(
                "lora.target_modules=all-linear: without %s, which PEFT can't adapt",
                names,
            )
            alternatives = "|".join(map(re.escape, sorted(refused)))
            patterns.append(rf"(.*\.)?({alternatives})")
    return patterns


def save_adapter(
    model: "PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    variables: Mapping[str, Any] | None = None,
) -> None:
    """Save the adapter and the tokenizer as a PEFT folder, completely or not at all.

    `generation_config.json` holds the ends of answers that were learnt. The base is named without
    a path of this machine.

    Args:
        model: The model with the adapter.
        tokenizer: The base's tokenizer.
        folder: It is replaced.
        variables: Variables of the chat template (`model.template_kwargs`).
    """
    ends = Encoder(tokenizer, variables).ends
    generation_config = generation_config_with_ends(model.get_base_model(), ends)
    with replace_folder(folder) as draft:
        with name_file_in_errors(draft), public_base_name(model):
            model.save_pretrained(draft, save_embedding_layers=False)
        write_generation_config(generation_config, draft)
        save_tokenizer(tokenizer, draft)


def load_adapter(model: "PeftModel", folder: Path) -> None:
    """Load saved adapter weights into a model that has an adapter of the same shape."""
    from peft import load_peft_weights, set_peft_model_state_dict

    weights = load_peft_weights(str(folder), device="cpu")
    set_peft_model_state_dict(model, weights)
