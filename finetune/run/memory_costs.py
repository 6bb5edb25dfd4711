"""What a base, its activations and its logits take in memory, from the base's shapes alone."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D

from finetune.config.schema import RunConfig
from finetune.config.sections.model import QuantizationSettings
from finetune.engine.packed.autograd_backend import AutogradBackend
from finetune.engine.packed.gpu.stored_blocks import count_fewest
from finetune.model.architectures import logit_transform_of
from finetune.model.base_quantization import BITSANDBYTES, DEQUANTIZED, BaseQuantization
from finetune.model.experts import router_layers
from finetune.model.quantization import compute_dtype, should_dequantize
from finetune.run.decoder_memory import decoder_elements
from finetune.run.device_memory import Activations, BackwardMemory
from finetune.run.expert_costs import expert_shape, quantized_expert_count
from finetune.run.layer_widths import Widths, read_widths

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
    quantized = quantized_weights(skeleton, config, quantization)
    total = sum(weight.numel() for weight in skeleton.parameters())
    # Embeddings, norms, routers and the output layer are never quantised.
    rest = total - quantized
    rest_bytes = rest * compute_dtype(config.quantization).itemsize
    return int(
        quantized * bytes_per_weight(quantized, config, quantization) + rest_bytes
    )


def expert_buffer_bytes(
    skeleton: "PreTrainedModel", config: RunConfig, files: BaseQuantization | None
) -> int:
    """Return the bytes of the experts that are dequantised at once, 0 without 4-bit experts.

    Args:
        skeleton: The base without weights.
        config: The run's config.
        files: The quantization of the base's files.
    """
    layers = skeleton.config.get_text_config(decoder=True).num_hidden_layers
    experts = expert_shape(skeleton, layers)
    if experts is None or not quantized_expert_count(skeleton, config, files):
        return 0
    quantized = quantized_weights(skeleton, config, files)
    return experts.buffer_bytes(config, should_dequantize(quantized, config))


def quantized_weights(
    skeleton: "PreTrainedModel", config: RunConfig, files: BaseQuantization | None
) -> int:
    """Weights that quantization applies to: of linear layers but the output layer, and of experts.

    Args:
        skeleton: The base without weights.
        config: The run's config.
        files: The quantization of the base's files.
    """
    head = skeleton.get_output_embeddings()
    routers = router_layers(skeleton)
    weights = quantized_expert_count(skeleton, config, files)
    for name, module in skeleton.named_modules():
        is_linear = isinstance(module, torch.nn.Linear | Conv1D)
        if is_linear and module is not head and name not in routers:
            weights += module.weight.numel()
    return weights


def bytes_per_weight(
    weights: int, config: RunConfig, base: BaseQuantization | None
) -> float:
    """Return the bytes of a weight that quantization applies to, with its share of the scales.

    Args:
        weights: How many of these weights the base has.
        config: The run's config.
        base: The quantization of the base's files.
    """
    quantization = config.quantization
    if base is not None and base.method not in BITSANDBYTES | DEQUANTIZED:
        return base.bits / 8
    if quantization.load_in_4bit and not should_dequantize(weights, config):
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


def logits_bytes(shapes: Any, uses_decoder: bool, half_precision: bool) -> int:
    """Return the bytes of one chunk of logits.

    Args:
        shapes: The base's text config.
        uses_decoder: Whether the GPU's decoder computes; else autograd does, in float32.
        half_precision: Whether the base computes in 16 bits.
    """
    vocabulary: int = shapes.vocab_size
    logit_bytes = 2 if half_precision else 4
    if uses_decoder:
        from finetune.engine.packed.gpu.decoder import Decoder

        return Decoder.count_logits_bytes(shapes, logit_bytes)
    # Of capped logits a copy is kept for their gradient.
    copied = logit_bytes if logit_transform_of(shapes).cap is not None else 0
    # Those in 16 bits are copied to float32.
    rounded = logit_bytes if half_precision else 0
    return int(AutogradBackend.logits_chunk * vocabulary * (4 + rounded + copied))


def adapted_layers(model: Any) -> set[str]:
    """Return the last parts of the names of the layers with an adapter, for example q_proj."""
    modules = model.named_modules()
    return {
        name.rsplit(".", 1)[-1] for name, module in modules if hasattr(module, "lora_A")
    }


@dataclass(frozen=True)
class Elements:
    """Elements of activations in memory for each token."""

    stored: int
    """From the forward pass for the backward pass."""
    passing: int
    """Needed within the backward pass."""
    evaluating: int

    def backward_memory(self, tokens: int, element_bytes: int) -> BackwardMemory:
        """Return the bytes of so many tokens."""
        size = tokens * element_bytes
        return BackwardMemory(size * self.stored, size * self.passing)


def gpu_activations(
    shapes: Any,
    config: RunConfig,
    targets: set[str] | None,
    element_bytes: int,
    tokens: int,
    evaluated: int,
    base: Any,
    blocks: range | None = None,
    has_head: bool = True,
) -> Activations:
    """Count a GPU's activations in bytes.

    Args:
        shapes: The base's text config.
        config: The run's config.
        targets: Names of the adapted layers where the GPU's decoder computes; None: autograd does.
        element_bytes: Bytes of an element.
        tokens: Tokens of the largest training batch.
        evaluated: Tokens of the largest batch that is evaluated.
        base: The base without weights.
        blocks: On the GPU; None: all.
        has_head: Whether the output layer is on the GPU.
    """
    single = activation_elements(shapes, config, targets, 1, base, blocks)
    packed = activation_elements(shapes, config, targets, 2, base, blocks)
    logits = logits_bytes(shapes, targets is not None, element_bytes == 2)
    return Activations(
        single=single.backward_memory(tokens, element_bytes),
        packed=packed.backward_memory(tokens, element_bytes),
        logits=logits if has_head else 0,
        evaluating=evaluated * single.evaluating * element_bytes,
    )


def activation_elements(
    shapes: Any,
    config: RunConfig,
    targets: set[str] | None,
    slots: int,
    base: Any = None,
    blocks: range | None = None,
) -> Elements:
    """Count the elements of activations that one token needs.

    A layer keeps the inputs of its norms, its queries, keys and values, attention's output, the
    gate's inputs, and the inputs of linear layers: with the GPU's own decoder only of those that
    have an adapter, and not the gate's product. With checkpointing it keeps its input alone, but
    for the last layers (`count_fewest`). Within a layer, the forward and backward pass of the gate
    are the widest.

    Args:
        shapes: The base's text config.
        config: The run's config.
        targets: Names of the adapted layers where the GPU's decoder computes; None: autograd does.
        slots: How many slots train together.
        base: The base without weights, for its experts; None: it has none.
        blocks: On the GPU; None: all.
    """
    checkpointing = bool(config.trainer.checkpointing)
    layers: int = shapes.num_hidden_layers
    if targets is not None:
        stored = count_fewest(layers, slots) if checkpointing else layers
        return Elements(*decoder_elements(shapes, config, targets, stored, blocks))
    widths = read_widths(shapes, base)
    recurrent = recurrent_elements(shapes)
    if blocks is not None:
        layers = len(blocks)
    return _autograd_elements(layers, widths, recurrent, checkpointing)


def _autograd_elements(
    layers: int, widths: Widths, recurrent: int, checkpointing: bool
) -> Elements:
    attention = 2 * widths.queries + 2 * widths.keys + recurrent
    layer = 4 * widths.hidden + attention + 3 * widths.inner
    passing = 4 * widths.hidden + 2 * widths.queries + 4 * widths.inner
    if widths.experts is not None:
        layer += int(widths.experts.stored)
        passing += widths.experts.passing
    if not checkpointing:
        return Elements(layers * layer, passing, passing)
    # The layer whose backward pass runs has computed all its activations again.
    passing += layer
    return Elements(layers * widths.hidden, passing, passing)


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
