"""Architectures of base models."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


LLAMA_LIKE = {"llama", "mistral", "qwen2", "qwen3", "smollm3"}
"""Values of `model_type` that the packed engine supports: one linear head maps the decoder's last
hidden state to logits, and nothing scales or caps them."""


def text_config_of(config: "PreTrainedConfig") -> "PreTrainedConfig":
    """Return the language model's config, with its sizes.

    It is the config itself, or in a model of text and images an inner one.
    """
    text_config: PreTrainedConfig = config.get_text_config(decoder=True)
    return text_config
