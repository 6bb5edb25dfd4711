"""Architectures of base models that the packed engine knows."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


LLAMA_LIKE = {"llama", "mistral", "qwen2", "qwen3", "smollm3"}
"""Architectures whose decoder's last state goes through one linear head, and into the loss as it is."""


def text_config_of(config: "PreTrainedConfig") -> "PreTrainedConfig":
    """The config of the language model: in a model of text and images the sizes stand in an inner config."""
    text_config: PreTrainedConfig = config.get_text_config(decoder=True)
    return text_config
