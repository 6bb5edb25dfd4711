"""What a base, its activations and its logits take in memory, from the base's shapes alone."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D

from finetune.config.schema import RunConfig
from finetune.config.sections.model import QuantizationSettings
from finetune.engine.packed.autograd_backend import AutogradBackend
from finetune.model.architectures import largest_value
from finetune.model.base_quantization import BITSANDBYTES, DEQUANTIZED, BaseQuantization
from finetune.model.quantization import compute_dtype, should_dequantize
from finetune.model.quantized_layers import expert_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def base_bytes(
    skeleton: "PreTrainedModel",
    config: RunConfig,
    quantization: BaseQuantization | None = None,
) -> int:
    """Return the bytes of the base: quantised layers with scales, or dequantised layers.

    Args:
        skeleton: The base without weights.
        config: The run's config.
        quantization: The quantization of the base's files.
    """
    linear = _linear_weights(skeleton)
    total = sum(weight.numel() for weight in skeleton.parameters())
    # Embeddings, norms, fused experts and the output layer are never quantised.
    rest = total - linear
    rest_bytes = rest * compute_dtype(config.quantization).itemsize
    return int(
        linear * _bytes_per_linear_weight(linear, config, quantization) + rest_bytes
    )


def expert_bytes(skeleton: "PreTrainedModel", config: RunConfig) -> int:
    """Return the bytes of fused experts, which stay in 16 bits (on a CPU 32) in a quantised base.

    0 for a base that is not quantised.
    """
    if not config.quantization.is_quantized:
        return 0
    weights = sum(weight.numel() for weight in expert_weights(skeleton).values())
    return weights * compute_dtype(config.quantization).itemsize


def _linear_weights(skeleton: "PreTrainedModel") -> int:
    """Weights of the layers that quantization applies to: all linear ones but the output layer."""
    head = skeleton.get_output_embeddings()
    weights = 0
    for module in skeleton.modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head:
            weights += module.weight.numel()
    return weights


def _bytes_per_linear_weight(
    linear: int, config: RunConfig, base: BaseQuantization | None
) -> float:
    quantization = config.quantization
    if base is not None and base.method not in BITSANDBYTES | DEQUANTIZED:
        return base.bits / 8
    if quantization.load_in_4bit and not should_dequantize(linear, config):
        return 0.5 + _scale_bytes(quantization)
    if quantization.load_in_8bit:
        return 1.0
    return float(compute_dtype(quantization).itemsize)


def _scale_bytes(quantization: QuantizationSettings) -> float:
    """Bytes of the scales of 4-bit weights, for each weight."""
    if not quantization.bnb_4bit_use_double_quant:
        return 4 / 64  # one float32 scale for 64 weights
    # The scale has 8 bits, and 256 scales have one in float32.
    return 1 / 64 + 4 / (64 * 256)


def logits_bytes(vocabulary: int, uses_decoder: bool, half_precision: bool) -> int:
    """Return the bytes of one chunk of logits.

    Args:
        vocabulary: The number of tokens that the base knows.
        uses_decoder: Whether the GPU's decoder computes; else autograd does, which also has the
            chunk and its softmax in float32.
        half_precision: Whether the base computes in 16 bits.
    """
    if uses_decoder:
        from finetune.engine.packed.gpu.decoder import Decoder

        logit_bytes = 2 if half_precision else 4
        return int(Decoder.logits_chunk * vocabulary * logit_bytes)
    float32_bytes = 4 + 4
    logit_bytes = float32_bytes + 2 if half_precision else float32_bytes
    return int(AutogradBackend.logits_chunk * vocabulary * logit_bytes)


def adapted_layers(model: Any) -> set[str]:
    """Return the last parts of the names of the layers with an adapter, for example q_proj."""
    modules = model.named_modules()
    return {
        name.rsplit(".", 1)[-1] for name, module in modules if hasattr(module, "lora_A")
    }


@dataclass(frozen=True)
class Elements:
    """Elements of activations in memory for each token."""

    training: int
    evaluating: int


@dataclass(frozen=True)
class Activations:
    """Bytes of a run's largest batch."""

    training: int
    """Kept for the backward pass, and needed within it, when the run trains alone."""
    beside: int
    """The same when other slots train with it."""
    logits: int
    """One chunk of logits; on a CPU what it takes beyond the backward pass of a layer, which comes
    when the logits are freed."""
    evaluating: int
    """Without a backward pass, beyond `logits`."""


def gpu_activations(
    shapes: Any,
    config: RunConfig,
    targets: set[str] | None,
    element_bytes: int,
    tokens: int,
    evaluated: int,
) -> Activations:
    """Count a GPU's activations in bytes.

    Args:
        shapes: The base's text config.
        config: The run's config.
        targets: Names of the adapted layers where the GPU's decoder computes; None: autograd does.
        element_bytes: Bytes of an element.
        tokens: Tokens of the largest training batch.
        evaluated: Tokens of the largest batch that is evaluated.
    """
    alone = activation_elements(shapes, config, targets, slots=1)
    packed = activation_elements(shapes, config, targets, slots=2)
    return Activations(
        training=tokens * alone.training * element_bytes,
        beside=tokens * packed.training * element_bytes,
        logits=logits_bytes(shapes.vocab_size, targets is not None, element_bytes == 2),
        evaluating=evaluated * alone.evaluating * element_bytes,
    )


@dataclass(frozen=True)
class Widths:
    """Elements that one token has in the tensors of a layer."""

    hidden: int
    """Between layers, and in the norms."""
    queries: int
    keys: int
    """Its keys; the values have as many."""
    inner: int
    """Inside a feed-forward layer."""


def activation_elements(
    shapes: Any,
    config: RunConfig,
    targets: set[str] | None,
    slots: int,
) -> Elements:
    """Count the elements of activations that one token needs.

    A layer keeps the inputs of its norms, its queries, keys and values, attention's output, the
    gate's inputs, and the inputs of linear layers: with the GPU's own decoder only of those that
    have an adapter, and not the gate's product. With checkpointing it keeps its input alone, but
    for the last layers (`stored_blocks`). Within a layer, the forward and backward pass of the gate
    are the widest.

    Args:
        shapes: The base's text config.
        config: The run's config.
        targets: Names of the adapted layers where the GPU's decoder computes; None: autograd does.
        slots: How many slots train together.
    """
    layers: int = shapes.num_hidden_layers
    widths = read_widths(shapes)
    checkpointing = config.trainer.gradient_checkpointing is True
    if targets is None:
        recurrent = recurrent_elements(shapes)
        return _autograd_elements(layers, widths, recurrent, checkpointing)
    layer = _decoder_layer_elements(widths, config.lora.largest_rank, targets)
    if shapes.model_type == "qwen3":
        layer += widths.queries + widths.keys  # the inputs of the heads' own norms
    return _decoder_elements(layers, widths, layer, checkpointing, slots)


def _autograd_elements(
    layers: int, widths: Widths, recurrent: int, checkpointing: bool
) -> Elements:
    attention = 2 * widths.queries + 2 * widths.keys + recurrent
    layer = 4 * widths.hidden + attention + 3 * widths.inner
    passing = 4 * widths.hidden + 2 * widths.queries + 4 * widths.inner
    if not checkpointing:
        return Elements(layers * layer + passing, passing)
    # The layer whose backward pass runs has computed all its activations again.
    passing += layer
    return Elements(layers * widths.hidden + passing, passing)


def _decoder_elements(
    layers: int,
    widths: Widths,
    layer: int,
    checkpointing: bool,
    slots: int,
) -> Elements:
    """Count the elements of the GPU's decoder, of which one layer keeps `layer`."""
    from finetune.engine.packed.gpu.decoder import stored_blocks

    stored = stored_blocks(layers, slots) if checkpointing else layers
    inputs = (layers - stored) * widths.hidden
    passing = 3 * widths.hidden + 2 * widths.inner
    evaluating = layer + widths.hidden + widths.inner
    return Elements(stored * layer + inputs + passing, evaluating)


def _decoder_layer_elements(widths: Widths, rank: int, targets: set[str]) -> int:
    """Elements that one layer of the GPU's decoder keeps for each token."""
    adapts_attention = bool(targets & {"q_proj", "k_proj", "v_proj"})
    adapts_gate = bool(targets & {"gate_proj", "up_proj"})
    norm_inputs = 2 * widths.hidden
    adapter_inputs = (adapts_attention + adapts_gate) * widths.hidden
    attention = 2 * widths.queries + 2 * widths.keys
    gate_inputs = 2 * widths.inner
    # A group of projections with one input is computed together: all of them have a column of
    # ranks.
    projections = (
        3 * adapts_attention + 2 * adapts_gate + len(targets & {"o_proj", "down_proj"})
    )
    # The kernels compute with a power of two of at least 16.
    padded_rank = max(16, 1 << (rank - 1).bit_length())
    rank_columns = projections * padded_rank
    return norm_inputs + adapter_inputs + attention + gate_inputs + rank_columns


def block_weights(shapes: Any, config: RunConfig) -> int:
    """Return the dequantised weights of a block that several slots keep with checkpointing.

    They are kept from the block's second forward pass to its backward pass.
    """
    checkpointing = config.trainer.gradient_checkpointing is True
    if not (checkpointing and config.quantization.load_in_4bit):
        return 0
    widths = read_widths(shapes)
    return widths.hidden * 2 * (widths.queries + widths.keys + widths.inner)


def recurrent_elements(shapes: Any) -> int:
    """Return the elements that a layer of the gated delta rule keeps for each token (Qwen 3.5).

    Averaged over all layers; 0 for a base without such layers. The factors are fitted to what
    autograd allocates with transformers' own code, of rows of 90 to 300 tokens; it pads each row to
    a multiple of 64 tokens.
    """
    value_heads: int = getattr(shapes, "linear_num_value_heads", None) or 0
    layer_types: list[str] = getattr(shapes, "layer_types", None) or []
    if not value_heads or not layer_types:
        return 0
    keys: int = shapes.linear_num_key_heads * shapes.linear_key_head_dim
    repeated_keys: int = value_heads * shapes.linear_key_head_dim
    values: int = value_heads * shapes.linear_value_head_dim
    chunk = 64
    elements = 6 * keys + 9 * (repeated_keys + values) + 8 * chunk * value_heads
    return elements * layer_types.count("linear_attention") // len(layer_types)


def read_widths(shapes: Any) -> Widths:
    """Read the widths of a base's text config, with transformers' defaults."""
    hidden: int = shapes.hidden_size
    heads: int = shapes.num_attention_heads
    key_heads: int = largest_value(shapes, "num_key_value_heads") or heads
    head_size: int = largest_value(shapes, "head_dim") or hidden // heads
    # Keys that are expanded from a few columns (MLA), for each head.
    expanded: int | None = largest_value(shapes, "qk_nope_head_dim")
    if expanded:
        head_size = expanded + (largest_value(shapes, "qk_rope_head_dim") or 0)
    inner: int = largest_value(shapes, "intermediate_size") or 4 * hidden
    return Widths(
        hidden,
        heads * head_size,
        key_heads * head_size,
        inner,
    )
