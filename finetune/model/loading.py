"""Loading the frozen base and its config with transformers."""

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from finetune.compat import (
    forget_renamed_weights,
    keep_4bit_layers_trainable,
    record_loading_keys,
    remove_device_hooks,
    set_base_model_prefix,
)
from finetune.config.schema import RunConfig
from finetune.config.sections.model import ModelSettings
from finetune.errors import ConfigError, refusal
from finetune.model.base_config import (
    disabled_dropouts,
    explain_loading_errors,
    other_parts,
    read_published_config,
    text_model_config,
    without_quantization,
)
from finetune.model.base_quantization import (
    BaseQuantization,
    base_quantization,
    is_quantized_again,
    settings_of_base,
)
from finetune.model.device import on_gpu, spread_gpus
from finetune.model.expert_quantizer import quantize_experts
from finetune.model.layer_devices import (
    Placement,
    WeightBytes,
    move_inputs,
    reason_not_spread,
    spread_blocks,
)
from finetune.model.origin import remember_origin
from finetune.model.published_names import KEY_MAPPING, published_names
from finetune.model.quantization import (
    compute_dtype,
    quantization_config,
    require_bitsandbytes,
)
from finetune.model.quantized_layers import (
    arguments_for_quantized_base,
    log_unquantized_weights,
    set_4bit_compute_dtype,
)
from finetune.model.routed_experts import use_routed_experts
from finetune.model.source import BaseSource
from finetune.model.weights import check_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


log = logging.getLogger(__name__)


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
        ConfigError: bitsandbytes does not work here, the files can't be read, do not hold the
            model's weights or are quantised in another way, or `model.extra` has an argument that
            `from_pretrained` does not accept.
    """
    settings = config.model
    published = read_published_config(source, settings)
    base_config = text_model_config(published)
    # Refused before the weights are loaded, which may take minutes.
    present = base_quantization(base_config.to_dict())
    quantization = settings_of_base(present, config.quantization, settings)
    require_bitsandbytes(quantization)
    product_dtype = compute_dtype(quantization)
    # transformers then reports weights of other shapes, and `check_weights` refuses them in one
    # line that names them.
    arguments: dict[str, Any] = {"ignore_mismatched_sizes": True}
    arguments |= _extra_arguments(settings)
    requantized = is_quantized_again(present, quantization)
    if base_config is not published:
        arguments |= _text_model_arguments(published, base_config)
    if requantized:
        arguments["config"] = without_quantization(base_config)
    if "config" in arguments:
        # It has these dropouts already, and transformers then takes no changes of it.
        for name in disabled_dropouts(settings):
            arguments.pop(name, None)
    if quantization.is_quantized and (present is None or requantized):
        arguments["quantization_config"] = quantization_config(quantization)
    elif present is not None:
        arguments |= arguments_for_quantized_base(present, settings)
    if not on_gpu():
        _log_cpu_training(config)
    gpus = spread_gpus(config.trainer.gpus)
    if gpus > 1:
        skeleton = skeleton_of(base_config, settings)
        placement = place(skeleton, config, None if requantized else present, gpus)
        arguments["device_map"] = placement.device_map(skeleton)
    weights_dtype = product_dtype
    if settings.dtype != "auto":
        weights_dtype = getattr(torch, settings.dtype)
    with (
        explain_loading_errors(settings),
        _explain_extra_errors(settings),
        record_loading_keys() as names,
        quantize_experts(from_mxfp4=requantized),
    ):
        model, info = AutoModelForCausalLM.from_pretrained(
            source.location,
            revision=source.revision,
            trust_remote_code=settings.trust_remote_code,
            attn_implementation=settings.attn_implementation,
            dtype=weights_dtype,
            # Pickled weights could run code.
            use_safetensors=True,
            output_loading_info=True,
            **arguments,
        )
    check_weights(info, names, settings)
    if gpus > 1:
        remove_device_hooks(model)
        move_inputs(model)
    # Or the first evaluation on a CPU would switch them to a path that has no gradients.
    keep_4bit_layers_trainable(model)
    set_4bit_compute_dtype(model, product_dtype)
    use_routed_experts(model)
    log_unquantized_weights(model, quantization)
    if base_config is not published:
        # Or it would be saved under names that its class does not have.
        forget_renamed_weights(model)
        set_base_model_prefix(model)
    remember_origin(model, source, published_names(published, model))
    if quantization.is_quantized and not on_gpu():
        _copy_mapped_weights(model)
    return model


def _text_model_arguments(
    published: "PreTrainedConfig", text_config: "PreTrainedConfig"
) -> dict[str, Any]:
    """Return the arguments that load a published model's text model alone, and log it."""
    log.info(
        "model: of a model of type %s its text model alone is loaded (%s), without: %s",
        published.model_type,
        text_config.model_type,
        ", ".join(other_parts(published)),
    )
    return {"config": text_config, "key_mapping": KEY_MAPPING}


def _copy_mapped_weights(model: "PreTrainedModel") -> None:
    """Copy the weights that are not quantised out of the mapped files.

    On a CPU they are views of the files, all of whose pages they would keep in memory, although the
    quantised weights are copies. A base that is not quantised views nearly all of its files, and
    is left as it is.
    """
    for weight in model.parameters():
        if weight.is_floating_point():
            # In place, because the head may share the embedding's parameter.
            weight.data = weight.data.clone()


def _extra_arguments(settings: ModelSettings) -> dict[str, Any]:
    """Return the further arguments of `from_pretrained`, with the device that holds the base."""
    arguments = dict(settings.extra)
    # Without a GPU there is only the CPU, whatever the config says. Without a map transformers
    # would load onto the CPU even beside a GPU.
    if not on_gpu():
        arguments.pop("device_map", None)
    elif "device_map" not in arguments:
        arguments["device_map"] = {"": torch.cuda.current_device()}
    return arguments


def place(
    skeleton: "PreTrainedModel",
    config: RunConfig,
    files: BaseQuantization | None,
    gpus: int,
) -> Placement:
    """Return over which GPUs the modules of a base are spread.

    Args:
        skeleton: The base without weights.
        config: The run's config.
        files: The quantization that the base keeps of its files, if any.
        gpus: How many there are.

    Raises:
        ConfigError: The base can't be spread.
    """
    reason = reason_not_spread(skeleton, gpus)
    if reason is not None:
        raise refusal("trainer.gpus", gpus, f"{reason}; allowed: 1")
    other = matrix = float(compute_dtype(config.quantization).itemsize)
    if files is not None:
        matrix = files.bits / 8
    elif config.quantization.load_in_4bit:
        matrix = 0.5
    elif config.quantization.load_in_8bit:
        matrix = 1.0
    return spread_blocks(skeleton, gpus, WeightBytes(matrix, other))


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
