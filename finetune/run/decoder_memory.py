"""The elements of activations that the GPU's decoder needs for each token, and its weights.

A layer keeps the inputs of its norms, its queries, keys and values, attention's output, the gate's
inputs, and the inputs of those linear layers that have an adapter. With checkpointing it keeps its
input alone, but for the last layers (`stored_blocks`).
"""

from dataclasses import dataclass
from typing import Any

from finetune.config.schema import RunConfig
from finetune.model.decoder_blocks import DECODER_BLOCKS, DecoderBlock
from finetune.run.layer_widths import Widths, read_widths


@dataclass(frozen=True)
class _Adapters:
    """The adapters of a slot."""

    rank: int
    targets: set[str]
    """Names of the adapted layers."""

    def elements(self, layers: tuple[str, ...], width: int) -> int:
        """Elements that layers with the same input of a width keep for their adapters."""
        if self.targets.isdisjoint(layers):
            return 0
        return width + self.rank_columns(layers)

    def rank_columns(self, layers: tuple[str, ...]) -> int:
        """The input of layers through A: all layers of a group are computed together."""
        if self.targets.isdisjoint(layers):
            return 0
        # The kernels compute with a power of two of at least 16.
        padded_rank = max(16, 1 << (self.rank - 1).bit_length())
        return len(layers) * padded_rank


def decoder_elements(
    shapes: Any, config: RunConfig, targets: set[str], slots: int
) -> tuple[int, int]:
    """Count the elements of each token: in training, and in evaluation.

    Args:
        shapes: The base's text config.
        config: The run's config.
        targets: Names of the adapted layers.
        slots: How many slots train together.
    """
    from finetune.engine.packed.gpu.decoder import stored_blocks

    layers: int = shapes.num_hidden_layers
    widths = read_widths(shapes)
    block = DECODER_BLOCKS[shapes.model_type]
    adapters = _Adapters(config.lora.largest_rank, targets)
    layer = _attention_elements(widths, adapters, block)
    largest = layer
    feed_forward = _feed_forward_elements(widths, adapters, block)
    delta_nets = _DeltaNets.read(shapes)
    if delta_nets is not None:
        other = delta_nets.elements(widths, adapters)
        largest = max(layer, other)
        layer = int(delta_nets.share * other + (1 - delta_nets.share) * layer)
    largest += feed_forward
    layer += feed_forward
    # One layer at a time.
    evaluating = largest + widths.hidden + widths.inner
    stored = layers
    if config.trainer.gradient_checkpointing is True:
        stored = stored_blocks(layers, slots)
        # Any layer may be the one that is computed again.
        layer = largest
    # Within most layers, the forward and backward pass of the gate are the widest.
    training = stored * layer + 3 * widths.hidden + 2 * widths.inner
    if delta_nets is not None:
        # The layers above the last delta net have been freed before its backward pass.
        remaining = max(1, stored - delta_nets.layers_above)
        passing = 2 * widths.hidden + delta_nets.passing()
        training = max(training, remaining * layer + passing)
    inputs = (layers - stored) * widths.hidden
    return inputs + training, evaluating


def _attention_elements(
    widths: Widths, adapters: _Adapters, block: DecoderBlock
) -> int:
    norm_inputs = widths.hidden
    if block.attention_output_norm is not None:
        norm_inputs += widths.hidden
    if block.has_head_norms:
        norm_inputs += widths.queries + widths.keys
    gate = widths.queries if block.has_output_gate else 0
    heads = 2 * widths.queries + 2 * widths.keys
    inputs = adapters.elements(block.qkv, widths.hidden)
    return norm_inputs + gate + heads + inputs + adapters.rank_columns(("o_proj",))


def _feed_forward_elements(
    widths: Widths, adapters: _Adapters, block: DecoderBlock
) -> int:
    norm_inputs = widths.hidden
    if block.feed_forward_output_norm is not None:
        norm_inputs += widths.hidden
    gate_inputs = 2 * widths.inner
    inputs = adapters.elements(block.gate_up, widths.hidden)
    return norm_inputs + gate_inputs + inputs + adapters.rank_columns(("down_proj",))


@dataclass(frozen=True)
class _DeltaNets:
    """Layers with a gated delta net in place of attention (Qwen 3.5)."""

    share: float
    """Of all layers."""
    layers_above: int
    """Layers with attention above the last delta net."""
    keys: int
    """Columns of all keys, as of all queries."""
    values: int
    """Columns of all values."""
    heads: int
    """Value heads."""
    key_columns: int
    """Of one head."""

    @classmethod
    def read(cls, shapes: Any) -> "_DeltaNets | None":
        """Read them from a text config; None: there are none."""
        layer_types: list[str] = getattr(shapes, "layer_types", None) or []
        count = layer_types.count("linear_attention")
        if not count:
            return None
        heads: int = shapes.linear_num_value_heads
        return cls(
            share=count / len(layer_types),
            layers_above=layer_types[::-1].index("linear_attention"),
            keys=shapes.linear_num_key_heads * shapes.linear_key_head_dim,
            values=heads * shapes.linear_value_head_dim,
            heads=heads,
            key_columns=shapes.linear_key_head_dim,
        )

    def elements(self, widths: Widths, adapters: _Adapters) -> int:
        """What such a layer keeps, without its feed-forward layer."""
        from finetune.engine.packed.gpu.delta_net import INPUTS

        mixed = 2 * self.keys + self.values
        gates = self.values + 2 * self.heads
        inputs = adapters.elements(INPUTS, widths.hidden)
        output = self.values + adapters.rank_columns(("out_proj",))
        return widths.hidden + mixed + gates + inputs + output

    def passing(self) -> int:
        """What its backward pass needs within it."""
        from finetune.engine.packed.gpu.delta_rule import CHUNK

        mixed = 2 * self.keys + self.values
        states = 2 * self.values * self.key_columns // CHUNK
        # Those of T are float32.
        inverses = 2 * self.heads * CHUNK
        head_gradients = 2 * self.heads * self.key_columns
        return 2 * mixed + 3 * self.values + states + inverses + head_gradients


def block_weights(shapes: Any, config: RunConfig) -> int:
    """Return the dequantised weights of a block that several slots keep with checkpointing.

    They are kept from the block's second forward pass to its backward pass.
    """
    checkpointing = config.trainer.gradient_checkpointing is True
    if not (checkpointing and config.quantization.load_in_4bit):
        return 0
    widths = read_widths(shapes)
    attention = 2 * (widths.queries + widths.keys)
    # The last product is computed again only where a norm follows it.
    is_last_computed = DECODER_BLOCKS[shapes.model_type].feed_forward_output_norm
    feed_forward = (3 if is_last_computed else 2) * widths.inner
    return widths.hidden * (attention + feed_forward)
