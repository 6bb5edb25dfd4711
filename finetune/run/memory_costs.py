"""What a base, its activations and its logits take in memory, from the base's shapes alone."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from finetune.config.schema import RunConfig
from finetune.engine.packed.autograd_backend import AutogradBackend
from finetune.model.quantization import compute_dtype, should_dequantize

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def base_bytes(skeleton: "PreTrainedModel", config: RunConfig) -> int:
    """Return the bytes of the base: quantised layers with scales, or dequantised layers."""
    quantization = config.quantization
    head = skeleton.get_output_embeddings()
    element_bytes = compute_dtype(quantization).itemsize
    linear = sum(
        module.weight.numel()
        for module in skeleton.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )
    rest = sum(weight.numel() for weight in skeleton.parameters()) - linear
    if quantization.load_in_4bit and not should_dequantize(linear, config):
        # One float32 scale for 64 weights; double quantisation stores it in 8 bits, and one for
        # 256 of them.
        double = quantization.bnb_4bit_use_double_quant
        scales = 1 / 64 + 4 / (64 * 256) if double else 4 / 64
        linear_bytes = 0.5 + scales
    elif quantization.load_in_8bit:
        linear_bytes = 1.0
    else:
        linear_bytes = float(element_bytes)
    return int(linear * linear_bytes + rest * element_bytes)


def logits_bytes(vocabulary: int, uses_decoder: bool, half_precision: bool) -> int:
    """One chunk of logits. Autograd's backend also has the chunk and its softmax in float32."""
    if uses_decoder:
        from finetune.engine.packed.gpu.decoder import Decoder

        return int(Decoder.logits_chunk * vocabulary * (2 if half_precision else 4))
    return int(AutogradBackend.logits_chunk * vocabulary * (8 + (2 if half_precision else 0)))


def adapted_layers(model: Any) -> set[str]:
    """The last parts of the names of the layers that have an adapter, for example q_proj."""
    modules = model.named_modules()
    return {name.rsplit(".", 1)[-1] for name, module in modules if hasattr(module, "lora_A")}


@dataclass(frozen=True)
class Elements:
    """Elements of activations in memory for each token."""

    training: int
    evaluating: int


def activation_elements(
    shapes: Any, config: RunConfig, targets: set[str] | None, slots: int
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
    hidden = shapes.hidden_size
    inner = _inner_width(shapes)
    layers = shapes.num_hidden_layers
    queries, keys = _attention_widths(shapes)
    checkpointing = config.trainer.gradient_checkpointing is True
    if targets is None:
        layer = 4 * hidden + 2 * queries + 2 * keys + 3 * inner
        passing = 4 * hidden + 2 * queries + 4 * inner
        if not checkpointing:
            return Elements(layers * layer + passing, passing)
        passing += layer
        return Elements(layers * hidden + passing, passing)
    from finetune.engine.packed.gpu.decoder import stored_blocks

    layer = _decoder_layer_elements(shapes, config.lora.r, targets)
    whole = stored_blocks(layers, slots) if checkpointing else layers
    training = whole * layer + (layers - whole) * hidden + 3 * hidden + 2 * inner
    return Elements(training, layer + hidden + inner)


def _decoder_layer_elements(shapes: Any, rank: int, targets: set[str]) -> int:
    """Elements that one layer of the GPU's decoder keeps for each token."""
    hidden = shapes.hidden_size
    queries, keys = _attention_widths(shapes)
    adapts_attention = bool(targets & {"q_proj", "k_proj", "v_proj"})
    adapts_gate = bool(targets & {"gate_proj", "up_proj"})
    elements = (2 + adapts_attention + adapts_gate) * hidden
    elements += 2 * queries + 2 * keys + 2 * _inner_width(shapes)
    if shapes.model_type == "qwen3":
        elements += queries + keys  # the inputs of the heads' own norms
    # A group of projections with one input is computed together: all of them have a column of
    # ranks.
    projections = 3 * adapts_attention + 2 * adapts_gate + len(targets & {"o_proj", "down_proj"})
    padded_rank = max(16, 1 << (rank - 1).bit_length())
    return int(elements + projections * padded_rank)


def block_weights(shapes: Any, config: RunConfig) -> int:
    """Dequantised weights of a block, kept from its second forward pass to its backward pass."""
    checkpointing = config.trainer.gradient_checkpointing is True
    if not (checkpointing and config.quantization.load_in_4bit):
        return 0
    return int(shapes.hidden_size * 2 * (sum(_attention_widths(shapes)) + _inner_width(shapes)))


def _inner_width(shapes: Any) -> int:
    """Elements inside a feed-forward layer; by default four times the hidden size."""
    return int(getattr(shapes, "intermediate_size", None) or 4 * shapes.hidden_size)


def _attention_widths(shapes: Any) -> tuple[int, int]:
    """Elements of a token's queries, and of its keys."""
    heads = shapes.num_attention_heads
    head_size = getattr(shapes, "head_dim", None) or shapes.hidden_size // heads
    key_heads = getattr(shapes, "num_key_value_heads", heads)
    return heads * head_size, key_heads * head_size
