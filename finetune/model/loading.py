"""Loading the frozen base and its config with transformers."""

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.compat import keep_4bit_layers_trainable
from finetune.config.schema import RunConfig
from finetune.config.sections.model import ModelSettings
from finetune.errors import ConfigError
from finetune.model.device import on_gpu
from finetune.model.quantization import compute_dtype, quantization_config, require_bitsandbytes
from finetune.model.source import BaseSource
from finetune.model.tokenizer import explain_loading_errors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


log = logging.getLogger(__name__)


def read_base_config(source: BaseSource, model: ModelSettings) -> "PreTrainedConfig":
    """Read the base's own config: its architecture and sizes.

    Raises:
        ConfigError: It can't be read.
    """
    with explain_loading_errors(model):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            source.location,
            revision=source.revision,
            trust_remote_code=model.trust_remote_code,
        )
    return config


def skeleton_of(config: "PreTrainedConfig", model: ModelSettings) -> "PreTrainedModel":
    """Create a base without weights, on the meta device.

    Raises:
        ConfigError: transformers can't create it.
    """
    # Always float32: while transformers creates a model, its dtype is PyTorch's default in all
    # threads, and another one may be initialising an adapter.
    with explain_loading_errors(model), torch.device("meta"):
        skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, trust_remote_code=model.trust_remote_code, dtype=torch.float32
        )
    return skeleton


def load_base(source: BaseSource, config: RunConfig) -> "PreTrainedModel":
    """Load the base with its weights, quantised, on the GPU if there is one.

    Raises:
        ConfigError: bitsandbytes does not work here, the files can't be read, or `model.extra` has
            an argument that `from_pretrained` does not accept.
    """
    settings = config.model
    require_bitsandbytes(config.quantization)
    product_dtype = compute_dtype(config.quantization)
    bitsandbytes_config = quantization_config(config.quantization)
    extra = _extra_arguments(settings)
    if not on_gpu():
        _log_cpu_training(config)
    with explain_loading_errors(settings), _explain_extra_errors(settings):
        model = AutoModelForCausalLM.from_pretrained(
            source.location,
            revision=source.revision,
            trust_remote_code=settings.trust_remote_code,
            attn_implementation=settings.attn_implementation,
            dtype=product_dtype if settings.dtype == "auto" else getattr(torch, settings.dtype),
            quantization_config=bitsandbytes_config,
            use_safetensors=True,
            **extra,
        )
    keep_4bit_layers_trainable(model)
    return model


def _extra_arguments(settings: ModelSettings) -> dict[str, Any]:
    """Return the further arguments of `from_pretrained`, with the device that holds the base."""
    arguments = dict(settings.extra)
    if not on_gpu():
        arguments.pop("device_map", None)
    elif "device_map" not in arguments:
        arguments["device_map"] = {"": torch.cuda.current_device()}
    return arguments


def _log_cpu_training(config: RunConfig) -> None:
    dtype = str(compute_dtype(config.quantization)).removeprefix("torch.")
    is_paged = config.optimizer.name.startswith("paged")
    note = ", the paged optimizer in plain memory" if is_paged else ""
    log.info("no GPU: training on the CPU, in %s%s", dtype, note)


@contextlib.contextmanager
def _explain_extra_errors(settings: ModelSettings) -> Iterator[None]:
    """Turn the error for an unknown argument of `from_pretrained` into one of `model.extra`."""
    try:
        yield
    except TypeError as error:
        if not settings.extra:
            raise
        raise ConfigError(f"model.extra={settings.extra}: {error}") from error
