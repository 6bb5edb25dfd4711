"""What the blocks of decoders are made of, for the architectures that the GPU's kernels compute.

One short description for each: the GPU's decoder is built by it, and the memory plan counts by it.
What a base's modules and config say themselves (sizes, biases, windows, scales) is read there. A
description that leaves something out is found by `finetune.engine.packed.architecture_check`;
PyTorch's operations compute such a base then.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from finetune.model.architectures import largest_value, text_config_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class DecoderBlock:
    """What a block of a decoder is made of: Llama's, where nothing else is given.

    Names are those of the modules in transformers.
    """

    attention_norm: str = "input_layernorm"
    attention_output_norm: str | None = None
    """A second norm, after the attention and before it is added to the block's input."""
    feed_forward_norm: str = "post_attention_layernorm"
    feed_forward_output_norm: str | None = None
    has_head_norms: bool = False
    """Whether queries and keys are normalised, each head by itself."""
    has_value_norm: bool = False
    """Whether values are normalised too, by a norm without weights."""
    has_output_gate: bool = False
    """Whether the layer of the queries also computes a gate of attention's output."""
    norm_offset: float = 0.0
    """Added to the weights of norms."""
    norm_rounds_last: bool = False
    """Whether norms round to 16 bits after they multiply by the weight, instead of before."""
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """The layers of queries, keys and values, or the one that computes all three. Modules may lack
    the last ones: then values are what the keys are computed from, or keys and values are those of
    an earlier layer (Gemma 4)."""
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    """The layers of gate and up, or the one that computes both."""
    activation_key: str = "hidden_act"
    """The config's key of the feed-forward layer's activation."""
    config_window: bool = False
    """Whether all layers have the window of the config; else the attention modules have theirs."""
    rotary_by_layer_type: bool = False
    """Whether the angles of the rotary embedding depend on the type of layer."""
    position_kinds: int = 1
    """Positions that the rotary embedding takes for each token: of text they are equal."""
    scales_queries: bool = False
    """Whether queries grow with their position (`llama_4_scaling_beta`)."""
    per_layer_input_norm: str | None = None
    """The norm of what a block adds from its per-layer input, where the config gives these a
    size."""
    output_scalar: str | None = None
    """A buffer that a block's output is multiplied by."""


_LLAMA = DecoderBlock()
_MISTRAL = DecoderBlock(config_window=True)
_GEMMA = DecoderBlock(
    attention_output_norm="post_attention_layernorm",
    feed_forward_norm="pre_feedforward_layernorm",
    feed_forward_output_norm="post_feedforward_layernorm",
    has_head_norms=True,
    norm_offset=1.0,
    norm_rounds_last=True,
    activation_key="hidden_activation",
    rotary_by_layer_type=True,
)

DECODER_BLOCKS: dict[str, DecoderBlock] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": replace(_LLAMA, has_head_norms=True),
    "smollm3": _LLAMA,
    "mistral": _MISTRAL,
    "ministral3": replace(_MISTRAL, scales_queries=True),
    "phi3": replace(_MISTRAL, qkv=("qkv_proj",), gate_up=("gate_up_proj",)),
    "gemma3_text": _GEMMA,
    "gemma4_text": replace(
        _GEMMA,
        norm_offset=0.0,
        has_value_norm=True,
        per_layer_input_norm="post_per_layer_input_norm",
        output_scalar="layer_scalar",
    ),
    "qwen3_5_text": replace(
        _LLAMA,
        has_head_norms=True,
        has_output_gate=True,
        position_kinds=3,
        norm_offset=1.0,
        norm_rounds_last=True,
    ),
}
"""By `model_type` of the text config."""

ACTIVATIONS = ("silu", "swish", "gelu_pytorch_tanh")
"""Activations of feed-forward layers that the GPU's kernels compute."""

MOST_HEAD_COLUMNS = 512
"""The widest heads whose attention the GPU's kernels compute: their blocks must fit into shared
memory."""

CAUSAL = (None, False, "vision")
"""Values of `use_bidirectional_attention` with which no text token sees a later one."""


def decoder_block_of(config: "PreTrainedConfig") -> DecoderBlock | None:
    """Return what a base's blocks are made of; None where the GPU's kernels can't compute them.

    Args:
        config: The base's config.
    """
    shapes = text_config_of(config)
    # Other configs may lack the sizes that are read below.
    block = DECODER_BLOCKS.get(shapes.model_type)
    if block is None:
        return None
    is_supported = (
        getattr(shapes, block.activation_key) in ACTIVATIONS
        and head_dim_of(shapes) <= MOST_HEAD_COLUMNS
        and getattr(shapes, "use_bidirectional_attention", None) in CAUSAL
        and not getattr(shapes, "enable_moe_block", False)
    )
    return block if is_supported else None


def has_per_layer_inputs(shapes: "PreTrainedConfig", block: DecoderBlock) -> bool:
    """Return whether a base's blocks have per-layer inputs, from its text config."""
    size: int | None = getattr(shapes, "hidden_size_per_layer_input", None)
    return block.per_layer_input_norm is not None and bool(size)


def head_dim_of(shapes: "PreTrainedConfig") -> int:
    """Return the columns of the widest head of attention, from a text config."""
    head_dim: int | None = largest_value(shapes, "head_dim")
    return head_dim or shapes.hidden_size // shapes.num_attention_heads
