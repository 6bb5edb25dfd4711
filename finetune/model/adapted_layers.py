"""The layers of a base that have an adapter, with their ranks and alphas.

PEFT is imported only inside functions (see `adapter`).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class AdaptedLayer:
    """The adapter of one layer, or of one weight of a layer's experts."""

    r: int
    alpha: float
    is_parameter: bool
    """Whether it adapts a weight of experts (`target_parameters`)."""


def adapted_layers(model: "PeftModel") -> dict[str, AdaptedLayer]:
    """Return the adapters of the base's layers, by the full names that PEFT's patterns match."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    adapter = model.active_adapter
    layers = {}
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        is_parameter = isinstance(module, ParamWrapper)
        if is_parameter:
            # The adapters of several weights of the same experts wrap each other.
            experts = name.replace(".base_layer", "")
            name = f"{experts}.{module.parameter_name}"
        layers[name] = AdaptedLayer(
            module.r[adapter], module.lora_alpha[adapter], is_parameter
        )
    return layers
