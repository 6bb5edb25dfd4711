"""LoRA adapters on the experts of a mixture: `lora.extra.target_parameters`.

PEFT adds an adapter's product to the weights of all experts of a layer, and keeps the sum for the
backward pass, which needs them in 16 bits. Here each adapter computes the rows of its expert beside
the frozen weight, which may be in 4 bits. The adapters are saved as PEFT has them.

PEFT is imported only inside functions (see `adapter`).
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from finetune.compat import replace_parameter_adapter
from finetune.model.experts import (
    expert_modules,
    quantized_expert_weights,
    weight_names,
)
from finetune.model.routed_experts import Routing, use_routed_experts

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ExpertAdapter:
    """The adapters of one weight, one for each expert."""

    a: torch.Tensor
    """[experts, rank, in]."""
    b: torch.Tensor
    """[experts, out, rank]."""
    scaling: float

    def apply(self, rows: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Return what the adapters add for the rows of each expert [pairs, out].

        Args:
            rows: Sorted by expert [pairs, in].
            routing: How many rows each expert has.
        """
        outputs = []
        groups = torch.split(rows.to(self.a.dtype), routing.counts)
        for expert, group in enumerate(groups):
            if len(group):
                outputs.append(group @ self.a[expert].T @ self.b[expert].T)
        return (self.scaling * torch.cat(outputs)).to(rows.dtype)


def show_expert_shapes(model: "PreTrainedModel") -> None:
    """Let PEFT read the shapes of 4-bit experts, whose tensors are packed."""
    for experts, name in quantized_expert_weights(model):
        weight = getattr(experts, name)
        # As for weights that DeepSpeed has distributed.
        weight.ds_shape = weight.quant_state.shape


def use_expert_adapters(model: "PeftModel") -> None:
    """Let the adapters of a model's experts be computed here; nothing without such adapters."""
    from peft.tuners.lora.layer import ParamWrapper

    names = {
        id(experts): weight_names(experts) for experts in expert_modules(model).values()
    }
    for module in model.modules():
        if not isinstance(module, ParamWrapper):
            continue
        if module.parameter_name in names.get(id(module.get_base_layer()), ()):
            use_routed_experts(model.get_base_model())
            replace_parameter_adapter(module, functools.partial(_activate, module))


@contextlib.contextmanager
def _activate(wrapper: Any, adapters: Sequence[str]) -> Iterator[None]:
    """Let the experts compute a weight's adapter within the block."""
    active = [name for name in adapters if name in wrapper.lora_A]
    if not active:
        yield
        return
    (name,) = active
    a = wrapper.lora_A[name].weight
    b = wrapper.lora_B[name].weight
    count = wrapper.num_experts
    adapter = ExpertAdapter(
        a=a.view(count, -1, a.shape[1]),
        # PEFT has the experts of a rank side by side.
        b=b.view(len(b), -1, count).permute(2, 0, 1),
        scaling=wrapper.scaling[name],
    )
    experts = wrapper.get_base_layer()
    before = getattr(experts, "active_adapters", {})
    experts.active_adapters = {**before, wrapper.parameter_name: adapter}
    try:
        yield
    finally:
        experts.active_adapters = before
