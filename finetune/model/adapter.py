"""The LoRA adapter: its PEFT config, creation, saving and loading."""

import logging
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune.config.schema import LoraSettings, ModelSettings
from finetune.errors import ConfigError, refusal
from finetune.files.atomic import name_file_in_errors, replace_folder
from finetune.model.architectures import text_config_of
from finetune.model.loading import read_base_config, skeleton_of
from finetune.model.source import BaseSource

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


log = logging.getLogger(__name__)


def lora_config(settings: LoraSettings) -> "LoraConfig":
    """The arguments of PEFT."""
    from peft import LoraConfig

    arguments: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "r": settings.r,
        "lora_alpha": int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": settings.target_modules,
        "bias": settings.bias,
        "use_rslora": settings.use_rslora,
        "use_dora": settings.use_dora,
        "init_lora_weights": settings.init_lora_weights,
    }
    for name in settings.extra:
        if name in arguments:
            raise refusal(f"lora.extra.{name}", settings.extra[name], "has a key of its own")
    try:
        return LoraConfig(**arguments | settings.extra)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lora.extra={settings.extra}: {error}") from None


def modules_beside_language_model(model: "PreTrainedModel") -> list[str]:
    """The names of the modules that are neither the language model nor its head; those below them are not listed.

    In a model of text and images these are the vision tower and what projects its output. Empty for a model of text.
    """
    if text_config_of(model.config) is model.config:
        return []
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    decoder_path = next(name for name, module in model.named_modules() if module is decoder)
    beside: list[str] = []
    for name, module in model.named_modules():
        contains_decoder = f"{decoder_path}.".startswith(f"{name}.") or not name
        inside = [f"{above}." for above in (decoder_path, *beside)]
        if module is not head and not contains_decoder and not name.startswith(tuple(inside)):
            beside.append(name)
    return beside


def check_targets(source: BaseSource, model: ModelSettings, lora: LoraSettings) -> None:
    """Refuse target modules that the base's language model does not have, before the weights are loaded."""
    if lora.target_modules == "all-linear":
        return
    skeleton = skeleton_of(read_base_config(source, model), model)
    beside = tuple(f"{name}." for name in modules_beside_language_model(skeleton))
    linear = {
        name
        for name, module in skeleton.named_modules()
        if isinstance(module, torch.nn.Linear) and not f"{name}.".startswith(beside)
    }
    targets = [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules
    for target in targets:
        # PEFT takes a text as a pattern for whole names, a list's items as their ends.
        pattern = target if isinstance(lora.target_modules, str) else rf"(.*\.)?{re.escape(target)}"
        if not any(re.fullmatch(pattern, name) for name in linear):
            there = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise refusal("lora.target_modules", target, f"matches no linear layer; allowed: {', '.join(there)}")


_ONE_GENERATOR = threading.Lock()
"""PyTorch's own is the same for all threads."""


def add_adapter(model: "PreTrainedModel", lora: LoraSettings, seed: int) -> "PeftModel":
    """A fresh LoRA adapter in float32 on a base, drawn from the run's own seed.

    Rows are text alone, so in a model of text and images only the language model gets an adapter, unless
    `lora.extra.exclude_modules` says otherwise.
    """
    from peft import get_peft_model

    arguments = lora_config(lora)
    beside = modules_beside_language_model(model)
    if beside and "exclude_modules" not in lora.extra:
        log.info("lora: the language model gets the adapter; without: %s", ", ".join(beside))
        arguments.exclude_modules = rf"({'|'.join(map(re.escape, beside))})(\..*)?"
    with _ONE_GENERATOR:
        torch.manual_seed(seed)
        return get_peft_model(model, arguments)


def save_adapter(model: "PeftModel", tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Save the adapter and the tokenizer as a folder that PEFT reads, complete or not at all."""
    with replace_folder(folder) as draft:
        with name_file_in_errors(draft):
            model.save_pretrained(draft, save_embedding_layers=False)
        tokenizer.save_pretrained(draft)


def load_adapter(model: "PeftModel", folder: Path) -> None:
    """Put saved adapter weights into a model that has the same adapter."""
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
