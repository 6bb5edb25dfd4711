"""The names of a text model's layers in the model that it was published in.

A base with other modalities is loaded as its text model alone. Its adapters are saved under the
names that the layers have in the published model, so that they load there, and are read from them.
"""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM

from finetune.model.base_config import text_model_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Value = TypeVar("Value")

KEY_MAPPING = {
    r"^language_model\.lm_head": "lm_head",
    r"^language_model\.model": "model",
    r"^model\.language_model": "model",
}
"""Names of weights in the files of published models, older and newer, and in the text model."""

ADAPTED = "base_model.model."
"""What PEFT puts before the names of a base's layers."""


@dataclass(frozen=True)
class PublishedNames:
    """Where a text model's decoder is in the published model."""

    decoder: str
    """The decoder's name in the text model, with a dot behind it."""
    published: str
    """The same in the published model."""

    def to_published(self, name: str) -> str:
        """Turn the name of one of the text model's layers into the published one."""
        return _exchange(name, self.decoder, self.published)

    def from_published(self, name: str) -> str:
        """Turn a published name into that of the text model's layer; others stay."""
        return _exchange(name, self.published, self.decoder)

    def of_published(self, weights: Mapping[str, Value]) -> dict[str, Value]:
        """Rename an adapter's weights for the published model."""
        renamed = {}
        for name, weight in weights.items():
            layer = name.removeprefix(ADAPTED)
            renamed[ADAPTED + self.to_published(layer)] = weight
        return renamed

    def of_text_model(self, weights: Mapping[str, Value]) -> dict[str, Value]:
        """Rename an adapter's weights for the text model."""
        renamed = {}
        for name, weight in weights.items():
            layer = name.removeprefix(ADAPTED)
            renamed[ADAPTED + self.from_published(layer)] = weight
        return renamed

    def pattern_of_text_model(
        self, pattern: Mapping[str, Value] | None, layers: Iterable[str]
    ) -> dict[str, Value]:
        """Return a `rank_pattern` or `alpha_pattern` by the text model's layers, each in full.

        Args:
            pattern: By regular expressions that match ends of names of the published model, or of
                the text model.
            layers: The names of the adapted layers in the text model.
        """
        from peft.utils.other import get_pattern_key

        pattern = pattern or {}
        resolved = {}
        for layer in layers:
            for name in (self.to_published(layer), layer):
                key = get_pattern_key(pattern.keys(), name)
                if key in pattern:
                    resolved[layer] = pattern[key]
                    break
        return resolved


def _exchange(name: str, prefix: str, replacement: str) -> str:
    return replacement + name[len(prefix) :] if name.startswith(prefix) else name


def published_names(
    published: "PreTrainedConfig", text_model: "PreTrainedModel"
) -> PublishedNames | None:
    """Compare a text model with the model that it was published in.

    Args:
        published: The config of the whole model.
        text_model: The text model alone.

    Returns:
        The names; None where the base was published as the text model alone, or transformers can't
        create the whole model.
    """
    if text_model_config(published) is published:
        return None
    for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        # It raises an error for a type that it has no class for.
        with contextlib.suppress(ValueError), torch.device("meta"):
            whole: Any = auto_class.from_config(published, dtype=torch.float32)
            decoder_class = type(text_model.get_decoder())
            return PublishedNames(
                _name_of(decoder_class, text_model), _name_of(decoder_class, whole)
            )
    return None


def _name_of(decoder_class: type, model: Any) -> str:
    """Return the name of a model's module of a class, with a dot behind it."""
    for name, module in model.named_modules():
        if isinstance(module, decoder_class):
            return f"{name}."
    raise AssertionError(f"{type(model).__name__} has no {decoder_class.__name__}")
