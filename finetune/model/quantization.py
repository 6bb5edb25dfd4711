"""Quantization of the base by bitsandbytes: its arguments, compute dtype, dequantised weights.

bitsandbytes is imported only inside functions: importing it initialises CUDA, which fixes the
visible GPUs (see `device.select_gpus`), and may fail, which `require_bitsandbytes` explains.
"""

import math
from typing import TYPE_CHECKING

import torch
from transformers import BitsAndBytesConfig

from finetune.compat import bitsandbytes_has_native_library
from finetune.config.schema import RunConfig
from finetune.config.sections.model import QuantizationSettings
from finetune.errors import refusal
from finetune.model.device import on_gpu
from finetune.model.experts import dequantize_experts, quantized_expert_weights
from finetune.model.memory import total_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel


DEQUANTIZED_SHARE = 0.25
"""Share of the available memory that a dequantised base may take, in [0, 1]."""


def compute_dtype(settings: QuantizationSettings) -> torch.dtype:
    """Return the dtype of matrix products.

    On a CPU it is float32, unless the config names bfloat16. On a GPU with `auto` it is bfloat16
    where the hardware has it, else float16.
    """
    name = settings.bnb_4bit_compute_dtype
    # CPUs without bfloat16 instructions compute it many times slower than float32.
    if not on_gpu():
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    if name == "auto":
        # Older GPUs emulate bfloat16, but multiply float16 in hardware.
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def autocast(settings: QuantizationSettings) -> torch.autocast:
    """Return the mixed precision of training, for evaluation and generation; off on a CPU."""
    dtype = compute_dtype(settings)
    is_mixed = on_gpu() and dtype != torch.float32
    return torch.autocast("cuda", dtype=dtype, enabled=is_mixed)


def quantization_config(settings: QuantizationSettings) -> BitsAndBytesConfig | None:
    """Return the arguments of bitsandbytes; None for a base that is not quantised."""
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


def dense_weight(layer: torch.nn.Module) -> torch.Tensor:
    """Return the weight that a linear layer multiplies by, dequantised if it is 4-bit [out, in]."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    dense: torch.Tensor = dequantize_4bit(weight.data, state)
    return dense


def should_dequantize(weights: int, config: RunConfig) -> bool:
    """Return whether `dequantize_base` dequantises a base.

    It does if the base is 4-bit and memory allows it; on a GPU not with gradient checkpointing,
    which is for runs that are short of memory.

    Args:
        weights: Number of 4-bit weights.
        config: The run's config.
    """
    if not config.quantization.load_in_4bit:
        return False
    if on_gpu() and config.trainer.checkpointing:
        return False
    dtype = compute_dtype(config.quantization)
    dequantized_bytes = dtype.itemsize * weights
    return dequantized_bytes <= total_memory() * DEQUANTIZED_SHARE


def dequantize_base(model: "PreTrainedModel", config: RunConfig) -> None:
    """Dequantise a 4-bit base once instead of in each forward and backward, if memory allows it.

    The results are the same, bit for bit: bitsandbytes multiplies by the dequantised weights too.

    Args:
        model: The base; its 4-bit layers and experts are replaced by plain ones.
        config: The run's config.
    """
    if not config.quantization.load_in_4bit:
        return
    from bitsandbytes.nn import Linear4bit

    # Collected first: the size of all decides whether any is replaced.
    layers = []
    weights = 0
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, Linear4bit):
                layers.append((parent, name, child))
                # Not the weight's own size: it holds two 4-bit weights in a byte.
                weights += child.in_features * child.out_features
    for experts, name in quantized_expert_weights(model):
        weights += math.prod(getattr(experts, name).quant_state.shape)
    if not should_dequantize(weights, config):
        return
    for parent, name, layer in layers:
        weight = dense_weight(layer)
        # Forward and backward would round differently.
        if weight.dtype != compute_dtype(config.quantization):
            return
        setattr(parent, name, _plain_linear(weight, layer.bias))
    dequantize_experts(model, compute_dtype(config.quantization))


def _plain_linear(
    weight: torch.Tensor, bias: torch.nn.Parameter | None
) -> torch.nn.Linear:
    """Create a frozen linear layer from a weight [out, in], without allocating another."""
    out_features, in_features = weight.shape
    layer = torch.nn.Linear(
        in_features,
        out_features,
        bias=False,
        device="meta",
    )
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    # None: no bias.
    layer.bias = bias  # type: ignore[assignment]
    return layer


def require_bitsandbytes(settings: QuantizationSettings) -> None:
    """Refuse to quantise where bitsandbytes does not work.

    Raises:
        ConfigError: bitsandbytes can't be imported, or has no library for this machine.
    """
    if not (settings.load_in_4bit or settings.load_in_8bit):
        return
    bits = 4 if settings.load_in_4bit else 8
    key = f"quantization.load_in_{bits}bit"
    remedy = "allowed here: quantization=none"
    try:
        has_library = bitsandbytes_has_native_library()
    except ImportError as error:
        reason = f"bitsandbytes can't be imported ({error})"
        raise refusal(key, True, f"{reason}; {remedy}") from None
    # The package imports without it too, and then fails in the first quantised layer.
    if not has_library:
        reason = "bitsandbytes has no library for this machine"
        raise refusal(key, True, f"{reason}; {remedy}")
