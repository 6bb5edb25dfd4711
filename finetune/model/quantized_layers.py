"""Which weights of a base are quantised, and which stay in 16 bits."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import Mxfp4Config
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from finetune.config.sections.model import ModelSettings, QuantizationSettings
from finetune.errors import refusal
from finetune.model.base_quantization import BITSANDBYTES, DEQUANTIZED, BaseQuantization
from finetune.model.experts import expert_modules, is_quantizable, weight_names
from finetune.model.memory import GIB

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

SHOWN_NAMES = 3
"""How many names of weights a log line has."""

CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


def arguments_for_quantized_base(
    quantization: BaseQuantization, settings: ModelSettings
) -> dict[str, Any]:
    """Return what `from_pretrained` needs for a base that is quantised already, and log which.

    Args:
        quantization: The quantization of its files.
        settings: `model`.

    Raises:
        ConfigError: A base with this quantization can't be trained.
    """
    method = quantization.method
    if method in DEQUANTIZED:
        log.info(
            "quantization: the base is quantised already (mxfp4); dequantised to be trained"
        )
        return {"quantization_config": Mxfp4Config(dequantize=True)}
    if not _is_trainable(quantization.section):
        reason = (
            f"is quantised already ({method}), and transformers can't train that; "
            "allowed: its version in 16 bits, or quantised by bitsandbytes, gptq or awq"
        )
        raise refusal("model.name_or_path", settings.name_or_path, reason)
    log.info(
        "quantization: the base is quantised already (%s), and is used as it is", method
    )
    return {}


def _is_trainable(section: Mapping[str, Any]) -> bool:
    """Whether transformers can train weights of a quantization.

    True if it can't tell because the method's library is missing: loading names the library.
    """
    try:
        quantizer = AutoHfQuantizer.from_config(section, pre_quantized=True)
        return bool(quantizer.is_trainable)
    except ImportError:
        return True


def set_4bit_compute_dtype(model: "PreTrainedModel", dtype: torch.dtype) -> None:
    """Set the dtype of 4-bit matrix products; a quantised base's files name another machine's."""
    for module in model.modules():
        if hasattr(module, "compute_dtype") and hasattr(module, "quant_state"):
            module.compute_dtype = dtype


def quantizable_experts(model: "PreTrainedModel") -> dict[str, torch.nn.Parameter]:
    """Return the weights of experts that `expert_quantizer` quantises in 4 bits, by name.

    Args:
        model: A base that is not quantised, with or without weights.
    """
    weights = {}
    for module_name, experts in expert_modules(model).items():
        for name in weight_names(experts):
            weight = experts.get_parameter(name)
            if is_quantizable(weight):
                weights[f"{module_name}.{name}"] = weight
    return weights


def expert_weights(model: "PreTrainedModel") -> dict[str, torch.nn.Parameter]:
    """Return the weights of fused experts that are not quantised, by name.

    transformers keeps the experts of a layer in one tensor [experts, out, in].
    """
    weights: dict[str, torch.nn.Parameter] = {}
    for module_name, module in model.named_modules():
        # Their weights have three or more dimensions as well.
        if isinstance(module, CONVOLUTIONS):
            continue
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim == 3 and weight.is_floating_point():
                weights[f"{module_name}.{name}"] = weight
    return weights


def log_unquantized_weights(
    model: "PreTrainedModel", settings: QuantizationSettings
) -> None:
    """Log the experts and the linear layers that stay as they are in a quantised base."""
    if settings.method not in BITSANDBYTES:
        return
    experts = expert_weights(model)
    if experts:
        log.info("quantization: %s", describe_experts(experts))
    layers = _plain_linear_layers(model)
    if layers:
        log.info("quantization: %s", _describe("linear layers", layers))


def describe_experts(experts: Mapping[str, torch.Tensor]) -> str:
    """Say which experts stay in 16 bits, and how large they are."""
    return (
        f"{_describe('weights of experts', experts)} (only linear layers are quantised)"
    )


def _describe(noun: str, weights: Mapping[str, torch.Tensor]) -> str:
    names = list(weights)[:SHOWN_NAMES]
    if len(weights) > len(names):
        names.append("…")
    size = sum(weight.nbytes for weight in weights.values())
    types = {weight.dtype for weight in weights.values()}
    dtypes = sorted(str(dtype).removeprefix("torch.") for dtype in types)
    stay = f"{len(weights)} {noun} stay in {' and '.join(dtypes)}"
    return f"{stay}, {size / GIB:.2f} GiB: {', '.join(names)}"


def _plain_linear_layers(model: "PreTrainedModel") -> dict[str, torch.Tensor]:
    """Return the weights of the linear layers that are not quantised, but for the output layer."""
    # The output layer is never quantised, so it is not worth a line.
    head = model.get_output_embeddings()
    layers: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        # Exactly this class: bitsandbytes' quantised layers are subclasses of it.
        if type(module) is torch.nn.Linear and module is not head:
            layers[name] = module.get_parameter("weight")
    return layers


def restore_transposed_layers(model: "PreTrainedModel") -> None:
    """Put back the layers whose class keeps weights as [in, out] (GPT-2), after dequantization.

    bitsandbytes makes a linear layer [out, in] of them, and the model would be saved with weights
    that its class reads the wrong way round.
    """
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    for name, module in skeleton.named_modules():
        if isinstance(module, Conv1D):
            layer = model.get_submodule(name)
            if isinstance(layer, torch.nn.Linear):
                model.set_submodule(name, _transposed(layer))


def _transposed(layer: torch.nn.Linear) -> Conv1D:
    """Return a linear layer as the class that keeps its weight as [in, out]."""
    transposed = Conv1D(layer.out_features, layer.in_features)
    weight = layer.weight.detach().T.contiguous()
    transposed.weight = torch.nn.Parameter(weight)
    if layer.bias is not None:
        transposed.bias = torch.nn.Parameter(layer.bias.detach())
    return transposed
