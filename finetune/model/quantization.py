"""Quantization of the base by bitsandbytes: its arguments, compute dtype, dequantised weights."""

from typing import TYPE_CHECKING

import torch
from transformers import BitsAndBytesConfig

from finetune.compat import bitsandbytes_has_native_library
from finetune.config.schema import QuantizationSettings, RunConfig
from finetune.errors import refusal
from finetune.model.device import on_gpu
from finetune.model.memory import available_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def dense_weight(layer: torch.nn.Module) -> torch.Tensor:
    """A linear layer's weight [out, in] as it is multiplied by: what 4 bits hold, dequantised."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    dense: torch.Tensor = dequantize_4bit(weight.data, state)
    return dense


DEQUANTIZED_SHARE = 0.25
"""A dequantised base may take so much of the memory there is."""


def compute_dtype(settings: QuantizationSettings) -> torch.dtype:
    """The dtype of matrix products: on a CPU float32, unless bfloat16 is asked for by name."""
    name = settings.bnb_4bit_compute_dtype
    if not on_gpu():
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def autocast(settings: QuantizationSettings) -> torch.autocast:
    """Mixed precision as training has it, for evaluation and generation; nothing on a CPU."""
    dtype = compute_dtype(settings)
    return torch.autocast("cuda", dtype=dtype, enabled=on_gpu() and dtype != torch.float32)


def quantization_config(settings: QuantizationSettings) -> BitsAndBytesConfig | None:
    """The arguments of bitsandbytes, None for a base that is not quantised."""
    if settings.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if not settings.load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
        bnb_4bit_compute_dtype=compute_dtype(settings),
        bnb_4bit_use_double_quant=settings.bnb_4bit_use_double_quant,
    )


def keeps_dequantized(weights: int, config: RunConfig) -> bool:
    """Whether so many 4-bit weights are dequantised once: where memory allows.

    On a GPU not with gradient checkpointing, which is for where memory is short.
    """
    if not config.quantization.load_in_4bit or (on_gpu() and config.trainer.gradient_checkpointing is True):
        return False
    return compute_dtype(config.quantization).itemsize * weights <= available_memory() * DEQUANTIZED_SHARE


def keep_dequantized(model: "PreTrainedModel", config: RunConfig) -> None:
    """Dequantise a 4-bit base's weights once, not in each forward and backward, where memory allows.

    The numbers are the same, bit for bit: bitsandbytes too multiplies by the dequantised weights.
    """
    if not config.quantization.load_in_4bit:
        return
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    layers = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, Linear4bit)
    ]
    if not keeps_dequantized(sum(layer.in_features * layer.out_features for _, _, layer in layers), config):
        return
    for parent, name, layer in layers:
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        if weight.dtype != compute_dtype(config.quantization):
            return  # forward and backward would round differently
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        plain.bias = layer.bias
        setattr(parent, name, plain)


def require_bitsandbytes(settings: QuantizationSettings) -> None:
    """Refuse to quantise where bitsandbytes does not work; even PEFT imports it."""
    if not (settings.load_in_4bit or settings.load_in_8bit):
        return
    key = "quantization.load_in_4bit" if settings.load_in_4bit else "quantization.load_in_8bit"
    try:
        usable = bitsandbytes_has_native_library()
    except ImportError as error:
        raise refusal(key, True, f"bitsandbytes can't be imported ({error}); allowed here: quantization=none") from None
    if not usable:
        raise refusal(key, True, "bitsandbytes has no library for this machine; allowed here: quantization=none")
