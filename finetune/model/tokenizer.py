"""Loading a base's tokenizer with transformers. No torch is imported with this module."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from finetune.config.sections.model import ModelSettings
from finetune.errors import ConfigError, refusal
from finetune.model.source import BaseSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(source: BaseSource, settings: ModelSettings) -> "PreTrainedTokenizerBase":
    """Load the base's tokenizer, set to pad on the right with the end token.

    An end token and padding are told apart by labels and attention masks, not by their ids.

    Raises:
        ConfigError: The tokenizer can't be loaded, or has no end token.
    """
    from transformers import AutoTokenizer

    with explain_loading_errors(settings):
        tokenizer = AutoTokenizer.from_pretrained(
            source.location,
            revision=source.revision,
            trust_remote_code=settings.trust_remote_code,
        )
    if tokenizer.eos_token is None:
        reason = "its tokenizer has no end token"
        raise refusal("model.name_or_path", settings.name_or_path, reason)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    if settings.chat_template is not None:
        tokenizer.chat_template = settings.chat_template
    return tokenizer


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
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        allowed = f"can't be loaded: {reason}"
        raise refusal("model.name_or_path", settings.name_or_path, allowed) from error
