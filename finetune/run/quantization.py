"""The quantization that a run has: what its config asks for, or what the base has already.

No torch is imported.
"""

import dataclasses
import logging
from typing import TYPE_CHECKING

from finetune.config.schema import RunConfig
from finetune.model.base_quantization import (
    base_quantization,
    is_quantized_again,
    read_config_json,
    settings_of_base,
)

if TYPE_CHECKING:
    from finetune.run.resources import SharedResources

log = logging.getLogger(__name__)


def resolve_quantization(config: RunConfig, resources: "SharedResources") -> RunConfig:
    """Return the config with the quantization of a base that is quantised already.

    So the run's files say how the base was quantised, whatever was asked for.

    Raises:
        ConfigError: The base isn't there, its config can't be read, or it has another quantization
            than the config asks for.
    """
    base = base_quantization(read_config_json(resources.source(config.model)))
    settings = settings_of_base(base, config.quantization, config.model)
    if settings == config.quantization:
        return config
    assert base is not None
    scales = ", with quantised scales" if base.double else ""
    log.info("quantization=%s%s: the base is quantised already", base.method, scales)
    return dataclasses.replace(config, quantization=settings)


def quantization_method(config: RunConfig, resources: "SharedResources") -> str:
    """Return how a run's base is quantised: nf4, fp4, int8, none, or its files' other method.

    Args:
        config: The run's config, its quantization resolved.
        resources: Share the base's source.
    """
    base = base_quantization(read_config_json(resources.source(config.model)))
    if base is None or is_quantized_again(base, config.quantization):
        return config.quantization.method
    return base.method
