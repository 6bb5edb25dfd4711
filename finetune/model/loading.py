"""Loading the frozen base, its config and its tokenizer with transformers."""

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from finetune.compat import keep_4bit_layers_trainable
from finetune.config.schema import ModelSettings, RunConfig
from finetune.errors import ConfigError, refusal
from finetune.model.device import on_gpu
from finetune.model.quantization import compute_dtype, quantization_config, require_bitsandbytes
from finetune.model.source import BaseSource

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


log = logging.getLogger(__name__)


def load_tokenizer(source: BaseSource, settings: ModelSettings) -> "PreTrainedTokenizerBase":
    """The base's tokenizer, padding on the right with the end token: labels and masks tell padding from an end."""
    with explain_loading_errors(settings):
        tokenizer = AutoTokenizer.from_pretrained(
            source.location, revision=source.revision, trust_remote_code=settings.trust_remote_code
        )
    if tokenizer.eos_token is None:
        raise refusal("model.name_or_path", settings.name_or_path, "its tokenizer has no end token")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    if settings.chat_template is not None:
        tokenizer.chat_template = settings.chat_template
    return tokenizer


def read_base_config(source: BaseSource, model: ModelSettings) -> "PreTrainedConfig":
    """The base's own config: its architecture and shapes."""
    with explain_loading_errors(model):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            source.location, revision=source.revision, trust_remote_code=model.trust_remote_code
        )
    return config


def skeleton_of(config: "PreTrainedConfig", model: ModelSettings) -> "PreTrainedModel":
    """A base's shapes without its weights.

    Always in float32: while transformers builds a model, PyTorch has its dtype for a default, in all threads, and
    one of them may be drawing an adapter.
    """
    with explain_loading_errors(model), torch.device("meta"):
        skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, trust_remote_code=model.trust_remote_code, dtype=torch.float32
        )
    return skeleton


def load_base(source: BaseSource, config: RunConfig) -> "PreTrainedModel":
    """The base with its weights, quantised and frozen, on the GPU if there is one.

    Raises ConfigError where bitsandbytes or the model's files can't give what is asked.
    """
    require_bitsandbytes(config.quantization)
    quantized = quantization_config(config.quantization)
    extra = dict(config.model.extra)
    if not on_gpu():
        extra.pop("device_map", None)
        paged = ", the paged optimizer in plain memory" if config.optimizer.name.startswith("paged") else ""
        dtype = str(compute_dtype(config.quantization)).removeprefix("torch.")
        log.info("no GPU: training on the CPU, in %s%s", dtype, paged)
    elif "device_map" not in extra:
        extra["device_map"] = {"": torch.cuda.current_device()}
    named = config.model.dtype
    with explain_loading_errors(config.model), _known_extra(config.model):
        model = AutoModelForCausalLM.from_pretrained(
            source.location,
            revision=source.revision,
            trust_remote_code=config.model.trust_remote_code,
            attn_implementation=config.model.attn_implementation,
            dtype=compute_dtype(config.quantization) if named == "auto" else getattr(torch, named),
            quantization_config=quantized,
            use_safetensors=True,
            **extra,
        )
    keep_4bit_layers_trainable(model)
    return model


@contextlib.contextmanager
def _known_extra(settings: ModelSettings) -> Iterator[None]:
    """Name the key of an argument that from_pretrained does not take."""
    try:
        yield
    except TypeError as error:
        if not settings.extra:
            raise
        raise ConfigError(f"model.extra={settings.extra}: {error}") from error


@contextlib.contextmanager
def explain_loading_errors(settings: ModelSettings) -> Iterator[None]:
    """Say in one line what transformers says of a model folder that it can't read."""
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise refusal("model.name_or_path", settings.name_or_path, f"can't be loaded: {reason}") from error
