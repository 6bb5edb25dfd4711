"""Few layers of a base, of all kinds that it has.

Some kinds are listed in the config, layer by layer. Others follow from whole numbers in a way of
each architecture (the first layers of DeepSeek V3 have no experts, one of eight layers of Jamba has
attention): these show in the modules that transformers creates.
"""

from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM

from finetune.model.small_config import config_with_layers, layer_count, listed_kinds

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def config_with_few_layers(config: "PreTrainedConfig") -> "PreTrainedConfig":
    """Return a config with few layers, at least two, of the same kinds as all of its layers.

    Args:
        config: It is not changed.

    Raises:
        ValueError: Not even the layers up to the first of the last kind are of all kinds.
    """
    listed = listed_kinds(config)
    kinds = list(zip(listed, _module_kinds(config), strict=True))
    selected = sorted({kinds.index(kind) for kind in kinds})
    if len(selected) < 2 <= len(kinds):
        selected = [0, 1]
    # Where a kind follows from a layer's number, all layers before it are needed.
    for numbers in (selected, range(selected[-1] + 1)):
        small = config_with_layers(config, numbers)
        listed_of_small = [listed[number] for number in numbers]
        small_kinds = zip(listed_of_small, _module_kinds(small), strict=True)
        if set(small_kinds) == set(kinds):
            return small
    raise ValueError("no small base to try it on (fewer layers lack kinds of layers)")


def _module_kinds(config: "PreTrainedConfig") -> list[str]:
    """Return for each layer the names and classes of its modules."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    layers = layer_count(config)
    for module in skeleton.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == layers:
            return [_classes_inside(block) for block in module]
    raise ValueError(f"no small base to try it on (no list of its {layers} layers)")


def _classes_inside(block: torch.nn.Module) -> str:
    return repr([(name, type(module)) for name, module in block.named_modules()])
