"""bitsandbytes' 4-bit quantization in transformers, with the experts of a mixture.

transformers quantises linear layers only, and leaves the experts of a layer, which it keeps in one
tensor, in 16 bits (https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1849). Here each
such tensor is quantised as soon as it is loaded, so that never more than one is in 16 bits.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers.core_model_loading import WeightConverter
from transformers.integrations.mxfp4 import Mxfp4Dequantize
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from finetune.compat import replaced_4bit_quantizer
from finetune.model.device import on_gpu
from finetune.model.experts import (
    BLOCK,
    dequantize_experts,
    expert_modules,
    is_quantizable,
    router_layers,
    weight_names,
)
from finetune.model.heap import trim_heap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGE_BYTES = 2**20
"""Of a 4-bit weight of which copies in 32 bits were freed."""


@contextlib.contextmanager
def quantize_experts(from_mxfp4: bool) -> Iterator[None]:
    """Quantise experts too where transformers loads a base in 4 bits within the block.

    Args:
        from_mxfp4: The base's files have its experts in MXFP4, as gpt-oss is published.
    """
    quantizer = functools.partial(ExpertQuantizer, from_mxfp4=from_mxfp4)
    with replaced_4bit_quantizer(quantizer):
        yield


class ExpertQuantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
    """Quantises the linear layers and the experts of a base whose files are not in 4 bits."""

    def __init__(self, *arguments: Any, from_mxfp4: bool, **named: Any) -> None:
        """Take transformers' arguments, and the format of the files."""
        super().__init__(*arguments, **named)
        self._from_mxfp4 = from_mxfp4

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", device_map: Any, **others: Any
    ) -> None:
        super()._process_model_before_weight_loading(model, device_map, **others)
        # Files that bitsandbytes has quantised hold experts as they were then.
        if not self.pre_quantized:
            prepare_experts(model, self.quantization_config)
            return
        wrong = set(_wrong_on_cpu(model)) - set(self.modules_to_not_convert)
        if wrong and not on_gpu():
            width = model.get_submodule(min(wrong)).in_features
            reason = (
                f"bitsandbytes computes 4-bit layers of {width} inputs wrongly on a CPU"
            )
            raise ValueError(f"{reason}; allowed here: its version in 16 bits")

    def get_modules_to_not_convert(
        self, model: "PreTrainedModel", *arguments: Any, **named: Any
    ) -> list[str]:
        """Return the names of the linear layers that stay as they are."""
        names: list[str] = super().get_modules_to_not_convert(
            model, *arguments, **named
        )
        if self.pre_quantized:
            return names
        if not on_gpu():
            names += _wrong_on_cpu(model)
        return [*names, *router_layers(model)]

    def param_needs_quantization(
        self, model: "PreTrainedModel", param_name: str, **others: Any
    ) -> bool:
        """Whether a weight is quantised when it is loaded."""
        if super().param_needs_quantization(model, param_name, **others):
            return True
        module_name, _, name = param_name.rpartition(".")
        return is_prepared(getattr(model.get_submodule(module_name), name, None))

    def get_quantize_ops(self) -> Any:
        """Return what quantises a weight; on a CPU the gaps that it leaves are given back."""
        operation = super().get_quantize_ops()
        convert = operation.convert

        def convert_and_trim(*arguments: Any, **named: Any) -> dict[str, torch.Tensor]:
            weights: dict[str, torch.Tensor] = convert(*arguments, **named)
            if any(is_large(weight) for weight in weights.values()):
                trim_heap()
            return weights

        operation.convert = convert_and_trim
        return operation

    def get_weight_conversions(self) -> list[WeightConverter]:
        """Return what turns a file's tensors into weights."""
        if not self._from_mxfp4:
            conversions: list[WeightConverter] = super().get_weight_conversions()
            return conversions
        return [
            WeightConverter(
                [f"{name}_blocks", f"{name}_scales"], name, [Mxfp4Dequantize(self)]
            )
            for name in ("gate_up_proj", "down_proj")
        ]

    def is_serializable(self) -> bool:
        """Return whether transformers can save the quantised base: not with experts in 4 bits."""
        return not self._from_mxfp4 and self.pre_quantized

    def _dequantize(
        self, model: "PreTrainedModel", dtype: torch.dtype | None = None
    ) -> "PreTrainedModel":
        dequantize_experts(model, dtype or model.dtype)
        dense: PreTrainedModel = super()._dequantize(model, dtype)
        return dense


def prepare_experts(model: torch.nn.Module, settings: Any) -> None:
    """Give experts without weights the class of 4-bit weights, which quantises what is loaded.

    Args:
        model: On the meta device.
        settings: transformers' `BitsAndBytesConfig`.
    """
    from bitsandbytes.nn import Params4bit

    module: Any
    for module in expert_modules(model).values():
        for name in weight_names(module):
            weight = getattr(module, name)
            if not is_quantizable(weight):
                continue
            prepared = Params4bit(
                weight.data,
                requires_grad=False,
                quant_type=settings.bnb_4bit_quant_type,
                compress_statistics=settings.bnb_4bit_use_double_quant,
                quant_storage=settings.bnb_4bit_quant_storage,
            )
            setattr(module, name, prepared)
            # transformers transposes the weights of GPT-2's layers, and asks which class it is.
            module.source_cls = type(module)


def is_prepared(weight: Any) -> bool:
    """Whether a weight is one of `prepare_experts` that has no values yet."""
    return weight is not None and hasattr(weight, "bnb_quantized") and weight.ndim == 3


def is_large(weight: torch.Tensor) -> bool:
    """Whether the copies of a weight on a CPU are worth the time to trim the heap."""
    return weight.device.type == "cpu" and weight.nbytes >= LARGE_BYTES


def _wrong_on_cpu(model: torch.nn.Module) -> list[str]:
    """Return the names of the linear layers that bitsandbytes 0.50.2 dequantises wrongly on a CPU.

    It takes wrong scales where a block of weights reaches from one row into the next.
    """
    names = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            # GPT-2's weights are [in, out], and quantised as [out, in].
            weight = module.get_parameter("weight")
            inputs = len(weight) if isinstance(module, Conv1D) else weight.shape[1]
            if inputs % BLOCK:
                names.append(name)
    return names
