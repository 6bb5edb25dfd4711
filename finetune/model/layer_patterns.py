"""Which layers have an adapter, of which rank and alpha: `lora.extra` beside the base's layers."""

import re
from typing import TYPE_CHECKING

from finetune.config.sections.lora import CHOOSES_MATRICES, LoraSettings
from finetune.config.sections.model import ModelSettings
from finetune.errors import refusal
from finetune.model.adapted_layers import adapted_layers
from finetune.model.adapter import add_weightless_adapter
from finetune.model.base_config import read_base_config
from finetune.model.loading import skeleton_of
from finetune.model.source import BaseSource

if TYPE_CHECKING:
    from collections.abc import Iterable


def check_layer_patterns(
    source: BaseSource, model: ModelSettings, lora: LoraSettings
) -> None:
    """Check the arguments of `lora.extra` that choose layers, before the weights are loaded.

    Raises:
        ConfigError: No layer is left, or a pattern matches no layer with an adapter.
    """
    if not lora.extra.keys() & CHOOSES_MATRICES:
        return
    skeleton = skeleton_of(read_base_config(source, model), model)
    adapted = add_weightless_adapter(skeleton, lora)
    names = adapted_layers(adapted)
    for argument in ("rank_pattern", "alpha_pattern"):
        for pattern in lora.extra.get(argument) or {}:
            _require_match(argument, pattern, names)


def _require_match(argument: str, pattern: str, names: "Iterable[str]") -> None:
    # As PEFT matches it.
    if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
        return
    ends = sorted({name.rsplit(".", 1)[-1] for name in names})
    allowed = f"matches no layer with an adapter; allowed: {', '.join(ends)}"
    raise refusal(f"lora.extra.{argument}", pattern, allowed)
