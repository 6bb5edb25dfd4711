"""A base's own config: its architecture and sizes. No torch is imported with this module."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from finetune.config.sections.model import ModelSettings
from finetune.errors import ConfigError, refusal
from finetune.model.source import BaseSource

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def read_base_config(source: BaseSource, model: ModelSettings) -> "PreTrainedConfig":
    """Read the base's own config.

    Raises:
        ConfigError: It can't be read.
    """
    from transformers import AutoConfig

    with explain_loading_errors(model):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            source.location,
            revision=source.revision,
            trust_remote_code=model.trust_remote_code,
        )
    return config


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
