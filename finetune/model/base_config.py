"""A base's own config: its architecture and sizes. No torch is imported with this module.

Of a base that is published with other modalities (images, sound), only the text model is loaded and
trained: its config is that of the text model.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from finetune.config.sections.model import ModelSettings
from finetune.errors import ConfigError, refusal
from finetune.model.architectures import (
    is_dropout,
    set_dropouts_to_zero,
    text_config_of,
)
from finetune.model.source import BaseSource

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def read_base_config(source: BaseSource, model: ModelSettings) -> "PreTrainedConfig":
    """Read the base's own config; of a base with other modalities, its text model's.

    Raises:
        ConfigError: It can't be read.
    """
    return text_model_config(read_published_config(source, model))


def read_published_config(
    source: BaseSource, model: ModelSettings
) -> "PreTrainedConfig":
    """Read a base's config as its files have it, with all its modalities.

    Only its dropouts are those of `model.extra` where that sets them to 0.

    Raises:
        ConfigError: It can't be read, or has no such dropout.
    """
    from transformers import AutoConfig

    with explain_loading_errors(model):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            source.location,
            revision=source.revision,
            trust_remote_code=model.trust_remote_code,
        )
    dropouts = disabled_dropouts(model)
    for name in dropouts:
        if not hasattr(text_config_of(config), name):
            reason = "is not in the base's config"
            raise refusal(f"model.extra.{name}", model.extra[name], reason)
    set_dropouts_to_zero(config, dropouts)
    return config


def disabled_dropouts(model: ModelSettings) -> list[str]:
    """Return the keys of `model.extra` that set a dropout of the base to 0."""
    return [
        name
        for name, value in model.extra.items()
        if is_dropout(name) and isinstance(value, float | int) and value == 0
    ]


def text_model_config(published: "PreTrainedConfig") -> "PreTrainedConfig":
    """Return the config of a published model's text model; its own one if it has no other part."""
    inner = published.get_text_config(decoder=True)
    is_part = any(inner is value for value in vars(published).values())
    # Remote code has no class for the text model alone.
    if not is_part or not type(published).__module__.startswith("transformers."):
        return published
    text_config = copy.deepcopy(inner)
    # Said of the whole model, but true of the text model's head and layers.
    for name in ("tie_word_embeddings", "quantization_config"):
        if hasattr(published, name):
            setattr(text_config, name, getattr(published, name))
    result: PreTrainedConfig = text_config
    return result


def without_quantization(config: "PreTrainedConfig") -> "PreTrainedConfig":
    """Return a copy of a config that does not say how the base's files are quantised."""
    plain = copy.deepcopy(config)
    del plain.quantization_config
    return plain


def other_parts(published: "PreTrainedConfig") -> list[str]:
    """Return the names of a published model's parts beside its text model: vision, audio."""
    text_type = text_model_config(published).model_type
    parts = []
    for name, value in vars(published).items():
        is_config = hasattr(value, "model_type") and name.endswith("_config")
        if is_config and value.model_type != text_type:
            parts.append(name.removesuffix("_config"))
    return parts


@contextlib.contextmanager
def explain_loading_errors(settings: ModelSettings) -> Iterator[None]:
    """Turn an error for a model folder that transformers can't read into one line.

    Raises:
        ConfigError: It names `model.name_or_path`, and the first line of the error.
    """
    try:
        yield
    except ConfigError:
        raise
    # What transformers raises for a missing file, a bad or unknown config, an unknown architecture,
    # a missing package of remote code, or damaged weights.
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        allowed = f"can't be loaded: {reason}"
        raise refusal("model.name_or_path", settings.name_or_path, allowed) from error
