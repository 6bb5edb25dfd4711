"""Which models are written as GGUF files, and the settings that llama.cpp reads of them.

No torch is imported with this module.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedConfig

SCALED_ROTARY = ("default", "linear", "llama3")
"""Scalings of rotary positions that are written; transformers' names."""

GLOBAL_EVERY = 6
"""In Gemma 3 every sixth layer attends to all tokens; llama.cpp has this pattern built in."""


@dataclass(frozen=True)
class Architecture:
    """How a kind of model is stored in a GGUF file."""

    name: str
    """llama.cpp's name."""
    interleaves_rotary: bool = False
    """Whether the rows of queries and keys are in the order of rotary pairs, as in Llama's own
    files; transformers has them in halves."""
    norm_offset: float = 0.0
    """What is added to the weights of norms: Gemma's formula adds 1, llama.cpp's does not."""
    activation: str = "silu"
    """The only activation that llama.cpp computes for this kind."""


ARCHITECTURES = {
    "llama": Architecture("llama", interleaves_rotary=True),
    # llama.cpp computes it as a Llama.
    "mistral": Architecture("llama", interleaves_rotary=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma3_text": Architecture(
        "gemma3", norm_offset=1.0, activation="gelu_pytorch_tanh"
    ),
}
"""By transformers' `model_type`."""


def text_settings(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of the text model in a base's `config.json`."""
    text: Mapping[str, Any] = values.get("text_config", values)
    return text


def unsupported(values: Mapping[str, Any]) -> str | None:
    """Return what of a model is not written without llama.cpp's converter; None: all is.

    Args:
        values: The settings of its text model, from `config.json`.
    """
    model_type = values.get("model_type")
    architecture = ARCHITECTURES.get(str(model_type))
    if architecture is None:
        names = ", ".join(ARCHITECTURES)
        return f"the architecture {model_type} (not one of {names})"
    activation = values.get("hidden_activation") or values.get("hidden_act")
    if activation not in (None, architecture.activation):
        return f"{model_type} with the activation {activation}"
    if values.get("use_sliding_window"):
        return f"{model_type} with a sliding window"
    kinds = {str(rotary.get("rope_type")) for rotary in _rotary_settings(values)}
    scaled = sorted(kinds.difference(SCALED_ROTARY, {"None"}))
    if scaled:
        return f"{model_type} with rotary positions scaled by {scaled[0]}"
    if model_type == "gemma3_text":
        return _unsupported_gemma3(values)
    return None


def _unsupported_gemma3(values: Mapping[str, Any]) -> str | None:
    head_dim = values.get("head_dim", 256)
    if values.get("query_pre_attn_scalar", 256) != head_dim:
        return "gemma3_text with a scale of queries that is not the heads' size"
    layers = values.get("layer_types") or []
    expected = [
        "sliding_attention" if (layer + 1) % GLOBAL_EVERY else "full_attention"
        for layer in range(len(layers))
    ]
    every = values.get("sliding_window_pattern", GLOBAL_EVERY)
    if layers != expected or every != GLOBAL_EVERY:
        return f"gemma3_text whose global layers are not every {GLOBAL_EVERY}th"
    return None


def _rotary_settings(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The settings of rotary positions; Gemma 3 has those of two kinds of layers."""
    rotary = values.get("rope_parameters") or values.get("rope_scaling") or {}
    nested = [value for value in rotary.values() if isinstance(value, Mapping)]
    if nested:
        return nested
    # An older config calls it "type".
    return [{"rope_type": rotary.get("type"), **rotary}]


def rotary_of(config: "PreTrainedConfig", kind: str = "full_attention") -> Any:
    """Return the settings of rotary positions of one kind of layers."""
    parameters: Mapping[str, Any] = config.rope_parameters
    return parameters.get(kind, parameters)


def add_settings(writer: "GGUFWriter", config: "PreTrainedConfig") -> None:
    """Add a model's sizes and settings under llama.cpp's names.

    Args:
        writer: A writer of the model's architecture.
        config: The config of a model of `ARCHITECTURES`.
    """
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rotary = rotary_of(config)
    writer.add_rope_freq_base(rotary["rope_theta"])
    if rotary.get("rope_type") == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rotary["factor"])
    if config.model_type in ("llama", "mistral"):
        writer.add_rope_dimension_count(head_dim)
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
        local = rotary_of(config, "sliding_attention")
        writer.add_rope_freq_base_swa(local["rope_theta"])
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)


def context_length(config: "PreTrainedConfig") -> int:
    """Return the tokens up to which llama.cpp computes what transformers does.

    llama.cpp has no window for Mistral: within the window there is no difference.
    """
    positions: int = config.max_position_embeddings
    window: int | None = getattr(config, "sliding_window", None)
    if config.model_type == "mistral" and window:
        return min(positions, window)
    return positions
