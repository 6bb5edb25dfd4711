"""The LoRA adapter: creation, saving and loading with PEFT.

PEFT is imported only inside functions: it imports bitsandbytes, which initialises CUDA and so fixes
the visible GPUs (see `device.select_gpus`).
"""

import contextlib
import functools
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from finetune.config.sections.lora import LoraSettings
from finetune.console import summary_line
from finetune.data.encoding import Encoder
from finetune.errors import ConfigError, is_out_of_memory_error, refusal
from finetune.files.atomic import name_file_in_errors, replace_folder
from finetune.model.adapter_files import MODEL_CARD, WEIGHTS
from finetune.model.expert_adapters import show_expert_shapes, use_expert_adapters
from finetune.model.lora_config import lora_config
from finetune.model.origin import (
    generation_config_with_ends,
    public_base_name,
    published_names_of,
    write_generation_config,
)
from finetune.model.published_adapter import (
    rename_for_published,
    rename_for_text_model,
)
from finetune.model.target_modules import (
    excluded_modules,
    expression_of,
    linear_targets,
)
from finetune.model.tokenizer import save_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_SEED_LOCK = threading.RLock()
"""Held while an adapter is initialised: PEFT draws from PyTorch's global generator, which all
threads share."""


@contextlib.contextmanager
def keep_random_state() -> Iterator[None]:
    """Put PyTorch's global generator back after the block; no adapter is initialised meanwhile."""
    with _SEED_LOCK:
        state = torch.get_rng_state()
        try:
            yield
        finally:
            torch.set_rng_state(state)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw an adapter's weights from PyTorch's global generator, seeded, in the block."""
    with _SEED_LOCK:
        torch.manual_seed(seed)
        yield


def add_adapter(model: "PreTrainedModel", lora: LoraSettings, seed: int) -> "PeftModel":
    """Add a fresh LoRA adapter in float32 to a base.

    In a model of text and images only the language model gets an adapter, because rows are text
    alone. What `lora.extra.exclude_modules` names is left out too.

    Args:
        model: The base; its target modules are replaced in place.
        lora: The adapter's settings.
        seed: Seed of the adapter's initial weights.

    Raises:
        ConfigError: PEFT refuses the targets.
    """
    from peft import get_peft_model

    config = lora_config(lora)
    targets = linear_targets(model, lora)
    if targets != lora.target_modules:
        config.target_modules = set(targets)
    # The user's expression first: it may begin with flags, or refer to its groups by number.
    patterns = [_exclusion(config.exclude_modules), *excluded_modules(model, lora)]
    config.exclude_modules = "|".join(filter(None, patterns)) or None
    show_expert_shapes(model)
    # Directly before the weights are drawn: the same seed must give the same adapter.
    with without_peft_notes(), seeded(seed):
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise refusal("lora.target_modules", lora.target_modules, reason) from error
    use_expert_adapters(adapted)
    return adapted


def add_weightless_adapter(
    skeleton: "PreTrainedModel", lora: LoraSettings
) -> "PeftModel":
    """Add an adapter without weights, as its base is: its layers and shapes alone.

    Args:
        skeleton: A base on the meta device; its target modules are replaced in place.
        lora: The adapter's settings.

    Raises:
        ConfigError: PEFT refuses the targets.
    """
    with torch.device("meta"):
        return add_adapter(skeleton, lora, seed=0)


def _exclusion(modules: str | set[str] | None) -> str:
    """Return a regular expression for modules as PEFT excludes them; empty for none.

    Args:
        modules: A regular expression, or the ends of names.
    """
    if not modules:
        return ""
    if isinstance(modules, str):
        return modules
    return expression_of(modules)


@contextlib.contextmanager
def without_peft_notes() -> Iterator[None]:
    """Hide PEFT's notes on settings that it makes itself, for fused experts and for GPT-2."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        # `attach_adapter` refuses such an adapter.
        warnings.filterwarnings("ignore", "Found missing adapter keys")
        # Patterns of the user that match nothing are refused by `check_layer_patterns`.
        warnings.filterwarnings("ignore", r".*_pattern keys did not match any")
        yield


def save_adapter(
    model: "PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    variables: Mapping[str, Any] | None = None,
) -> None:
    """Save the adapter and the tokenizer as a PEFT folder, completely or not at all.

    `generation_config.json` holds the ends of answers that were learnt. The base is named without
    a path of this machine. Of a base that was published with other modalities, the adapter has the
    published model's names.

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
            draft.mkdir(parents=True)
            # PEFT completes a card that is there; it takes longer to make a blank one each time.
            (draft / MODEL_CARD).write_text(_blank_card(), encoding="utf-8")
            model.save_pretrained(draft, save_embedding_layers=False)
        names = published_names_of(model.get_base_model())
        if names is not None:
            rename_for_published(draft, model, names)
        write_generation_config(generation_config, draft)
        save_tokenizer(tokenizer, draft)


@functools.cache
def _blank_card() -> str:
    """Return the model card that PEFT begins with."""
    from huggingface_hub import ModelCard, ModelCardData

    return str(ModelCard.from_template(ModelCardData()))


def load_adapter(model: "PeftModel", folder: Path) -> None:
    """Load saved adapter weights into a model that has an adapter of the same shape."""
    from peft import load_peft_weights, set_peft_model_state_dict

    # On the CPU first: PEFT copies them to where the adapter is.
    weights = load_peft_weights(str(folder), device="cpu")
    names = published_names_of(model.get_base_model())
    if names is not None:
        weights = names.of_text_model(weights)
    set_peft_model_state_dict(model, weights)


def attach_adapter(base: "PreTrainedModel", folder: Path) -> "PeftModel":
    """Put a saved adapter on its base. Some adapters change the base for good.

    Raises:
        ConfigError: The adapter is damaged, or belongs to another base: PEFT refuses it, or its
            file has not the very weights that its settings need.
    """
    show_expert_shapes(base)
    with without_peft_notes():
        try:
            model = _attached(base, folder)
        # PEFT's, those of safetensors, PyTorch and Python: none has a class of its own.
        except Exception as error:
            if isinstance(error, ConfigError) or is_out_of_memory_error(error):
                raise
            reason = summary_line(error)
            raise ConfigError(
                f"{folder}: can't be loaded as an adapter: {reason}"
            ) from error
    _require_all_weights(model, folder)
    use_expert_adapters(model)
    return model


def _require_all_weights(model: "PeftModel", folder: Path) -> None:
    """Compare the names of an adapter's weights with those that it should have.

    PEFT leaves weights that are missing at their initial values, and ignores those of layers that
    the base does not have.
    """
    from peft import get_peft_model_state_dict

    with safe_open(folder / WEIGHTS, "pt") as file:
        saved = dict.fromkeys(file.keys())
    names = published_names_of(model.get_base_model())
    if names is not None:
        saved = names.of_text_model(saved)
    state = model.state_dict()
    needed = get_peft_model_state_dict(model, state, save_embedding_layers=False).keys()
    missing = needed - saved.keys()
    # PEFT also saves embeddings, under the base's names.
    unused = saved.keys() - needed - state.keys()
    for problem, weights in (("lacks", missing), ("has no layer for", unused)):
        if weights:
            shown = f"{len(weights)} weights, as {min(weights)}"
            raise ConfigError(
                f"{folder}: is no complete adapter of its base: {problem} {shown}"
            )


def _attached(base: "PreTrainedModel", folder: Path) -> "PeftModel":
    from peft import PeftConfig, PeftModel

    names = published_names_of(base)
    if names is None:
        return PeftModel.from_pretrained(base, folder)
    config = PeftConfig.from_pretrained(folder)
    rename_for_text_model(config, names, folder)
    return PeftModel.from_pretrained(
        base,
        folder,
        config=config,
        # PEFT takes away what it puts before the names first.
        key_mapping={f"^{re.escape(names.published)}": names.decoder},
    )
