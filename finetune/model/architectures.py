"""What base models are made of, as far as it differs from one architecture to another.

Everything here is read from a base's config. Where a description leaves something out,
`finetune.engine.packed.architecture_check` finds that the packed engine computes something else
than the base's own code, and TRL trains the base.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig


LOGIT_FACTORS = ("logit_scale", "lm_head_multiplier")
"""Keys whose value the logits are multiplied by: Cohere, Falcon H1."""

LOGIT_DIVISORS = ("logits_scaling",)
"""Keys whose value the logits are divided by: Granite, MiniCPM 3."""

MULTIPLIED_BY_DIVISOR = {"hyperclovax"}
"""Types that multiply by the value of `LOGIT_DIVISORS`."""

LOGIT_CAPS = ("final_logit_softcapping", "logits_soft_cap")
"""Keys whose value bounds the logits: Gemma, RecurrentGemma."""

WINDOWS = (
    "sliding_window",
    "attention_chunk_size",
    "attention_window_size",
    "window_size",
)
"""Names that architectures have for the number of tokens that a token sees."""

DROPOUT_NAMES = ("dropout", "pdrop")
"""What is in the names of keys that are probabilities of dropout."""

WITHOUT_DROPOUT = ("classifier", "summary", "lora")
"""What is in the names of those that a causal language model does not use."""

PASSED_OVER = {"gemma3n_text": ("correction_coefs",)}
"""Linear layers whose weight a base's code reads in training, past an adapter on the layer, by
`model_type` of the text config."""


def text_config_of(config: "PreTrainedConfig") -> "PreTrainedConfig":
    """Return the language model's config, with its sizes.

    It is the config itself, or in a model of text and images an inner one.
    """
    text_config: PreTrainedConfig = config.get_text_config(decoder=True)
    return text_config


def largest_value(config: "PreTrainedConfig", name: str) -> Any:
    """Return a value of a text config; the largest where layers have their own (Gemma 3n and 4).

    None if the config has no such key.
    """
    if getattr(config, "is_heterogeneous", False):
        values = [getattr(layer, name, None) for layer in config.per_layer_config]
    else:
        value = getattr(config, name, None)
        values = value if isinstance(value, list) else [value]
    return max((value for value in values if value is not None), default=None)


@dataclass(frozen=True)
class LogitTransform:
    """What a base does to its head's outputs before they are logits."""

    factor: float = 1.0
    """They are multiplied by it."""
    cap: float | None = None
    """Then they are bounded to this number: cap · tanh(logits / cap); None: they are not."""

    def apply(self, outputs: "torch.Tensor") -> "torch.Tensor":
        """Turn a head's outputs into logits, in place: they are the largest tensors."""
        if self.factor != 1.0:
            outputs.mul_(self.factor)
        if self.cap is not None:
            outputs.div_(self.cap).tanh_().mul_(self.cap)
        return outputs

    def backward(
        self, gradient: "torch.Tensor", logits: "torch.Tensor | None"
    ) -> "torch.Tensor":
        """Turn the gradient of logits into that of the head's outputs, in place.

        Args:
            gradient: Of a loss with respect to the logits; overwritten.
            logits: As `apply` returned them, overwritten; not read without a cap.
        """
        if self.cap is not None:
            assert logits is not None
            # The derivative of tanh is 1 - tanh².
            derivative = logits.div_(self.cap).square_().neg_().add_(1)
            gradient.mul_(derivative)
        if self.factor != 1.0:
            gradient.mul_(self.factor)
        return gradient


def logit_transform_of(config: "PreTrainedConfig") -> LogitTransform:
    """Return what a base of a config does to its head's outputs."""
    text_config = text_config_of(config)
    factor = 1.0
    for name in LOGIT_FACTORS:
        factor *= getattr(text_config, name, None) or 1.0
    for name in LOGIT_DIVISORS:
        divisor = getattr(text_config, name, None) or 1.0
        is_factor = text_config.model_type in MULTIPLIED_BY_DIVISOR
        factor = factor * divisor if is_factor else factor / divisor
    caps = [getattr(text_config, name, None) for name in LOGIT_CAPS]
    return LogitTransform(factor, next(filter(None, caps), None))


def is_dropout(name: str) -> bool:
    """Return whether a key of a base's config is a probability of dropout in training."""
    is_named = any(word in name for word in DROPOUT_NAMES)
    return is_named and not any(word in name for word in WITHOUT_DROPOUT)


def active_dropouts(config: "PreTrainedConfig") -> dict[str, float]:
    """Return the keys of a base's config that drop values in training, with their values."""
    values: dict[str, Any] = text_config_of(config).to_dict()
    return {
        name: value
        for name, value in values.items()
        if is_dropout(name) and isinstance(value, float | int) and value > 0
    }


def set_dropouts_to_zero(config: "PreTrainedConfig", names: Iterable[str]) -> None:
    """Set these dropouts of a base's config to 0."""
    for name in names:
        setattr(text_config_of(config), name, 0.0)


def scaled_positions(config: "PreTrainedConfig") -> int | None:
    """Return after how many positions a base's rotary embedding changes all its frequencies.

    Then a row's frequencies follow the longest row beside it. None: they never change.
    """
    text_config = text_config_of(config)
    rope = getattr(text_config, "rope_parameters", None) or {}
    # Some bases have one for each type of layer.
    for parameters in (rope, *rope.values()):
        if not isinstance(parameters, dict):
            continue
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            original: int | None = parameters.get("original_max_position_embeddings")
            if original is None:
                original = getattr(
                    text_config, "original_max_position_embeddings", None
                )
            return original or text_config.max_position_embeddings
    return None
