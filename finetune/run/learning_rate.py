"""The learning rate that suits the base, for runs that give none.

`optimizer.learning_rate=null` means `model.learning_rate`, which a model's YAML has for its own
base. Every other base gets a rate by its hidden size. No torch is imported.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from finetune.config.schema import RunConfig
from finetune.errors import refusal
from finetune.model.base_quantization import read_config_json

if TYPE_CHECKING:
    from finetune.model.source import BaseSource
    from finetune.run.resources import SharedResources


log = logging.getLogger(__name__)


HIGHEST_RATE = 1e-3
"""No published best rate lies above it."""


WIDTH_NAMES = ("hidden_size", "n_embd", "d_model")
"""What architectures call the width of their layers."""


def rate_of_width(hidden_size: int) -> float:
    """Return the LoRA rate for a hidden size: 4e-4 * sqrt(4096 / hidden_size), at most 1e-3.

    A power law, fitted by least squares of logarithms to the best rates of 35 models with hidden
    sizes from 2048 to 8192, as published in tinker-cookbook (Thinking Machines,
    recipes/chat_sl/results/sft_sweep.md: LoRA of ranks 1 to 128, tulu3, batches of 128; rates
    4e-5, 1e-4, 3e-4, 1e-3 and 3e-3). The fit has the exponent -0.50 and 4.0e-4 at 4096; 26 of the
    35 rates lie within a factor of 1.8 of it. Below 2048 it is extrapolated. No model was best
    above 1e-3.

    Args:
        hidden_size: The width of the base's layers; of a base with several parts, its text part's.

    Returns:
        The rate to two digits.
    """
    rate = 4e-4 * (4096 / hidden_size) ** 0.5
    two_digits = float(f"{rate:.2g}")
    return min(HIGHEST_RATE, two_digits)


def resolve_learning_rate(config: RunConfig, resources: "SharedResources") -> RunConfig:
    """Return the config with `optimizer.learning_rate` as a number; a number stays as it is.

    The base's config is read only where neither the user nor the model's YAML gives a rate.

    Raises:
        ConfigError: The base isn't there, or its config names no width.
    """
    if config.optimizer.learning_rate is not None:
        return config
    rate = config.model.learning_rate
    reason = f"model {config.model.name_or_path}"
    if rate is None:
        width = _read_hidden_size(config, resources.source(config.model))
        rate = rate_of_width(width)
        reason = f"by hidden size {width}"
    log.info("optimizer.learning_rate=%s (%s)", rate, reason)
    optimizer = dataclasses.replace(config.optimizer, learning_rate=rate)
    return dataclasses.replace(config, optimizer=optimizer)


def _read_hidden_size(config: RunConfig, source: "BaseSource") -> int:
    """The width of the base's layers, from its `config.json` alone."""
    name = config.model.name_or_path
    values = read_config_json(source)
    # A base of several parts, as text and images, names its language model's width in a section.
    sections = [values.get("text_config"), values.get("llm_config"), values]
    for section in sections:
        width = _width_in(section)
        if width is not None:
            return width
    reason = f"the config.json of {name} has no hidden_size; give a number"
    raise refusal("optimizer.learning_rate", None, reason)


def _width_in(section: object) -> int | None:
    """The width that a section of a `config.json` names, None if it names none."""
    if not isinstance(section, Mapping):
        return None
    for name in WIDTH_NAMES:
        width = section.get(name)
        if isinstance(width, int):
            return width
    return None
