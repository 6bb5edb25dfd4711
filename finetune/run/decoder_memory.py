"""The elements of activations that the GPU's decoder needs for each token, and its weights.

A layer keeps the inputs of its norms, its queries, keys and values, attention's output, the gate's
inputs, and the inputs of those linear layers that have an adapter. With checkpointing it keeps its
input alone, but for the last layers (`engine.packed.gpu.stored_blocks`).
"""

from dataclasses import dataclass
from typing import Any

from finetune.config.schema import RunConfig
from finetune.engine.packed.gpu.stored_blocks import (
    BlockMemory,
    count_fewest,
    count_most,
)
from finetune.model.decoder_blocks import (
    DECODER_BLOCKS,
    DecoderBlock,
    has_per_layer_inputs,
)
from finetune.run.layer_widths import Widths, widths_by_layer


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


WORKSPACES = 2 * 32 * 2**20
"""Bytes that matrix products have for themselves on all streams, with that of recorded passes."""


@dataclass(frozen=True)
class RecordedMemory:
    """What recorded passes take beside their activations (`engine.packed.gpu.pass_recorder`)."""

    hidden_bytes: int
    """Of one token's hidden state."""
    block_weights: int
    """Weights of the linear layers of a block."""

    @classmethod
    def read(cls, shapes: Any, element_bytes: int) -> "RecordedMemory":
        """Read the sizes from a base's text config."""
        return cls(shapes.hidden_size * element_bytes, block_weight_count(shapes))

    def size(self, tokens: float) -> int:
        """The bytes of passes of so many tokens, 0 where they are not recorded."""
        from finetune.engine.packed.gpu.pass_recorder import MAX_PRODUCTS

        if tokens * self.block_weights >= MAX_PRODUCTS:
            return 0
        # The input of the blocks, and their output.
        return int(2 * tokens * self.hidden_bytes) + WORKSPACES


@dataclass(frozen=True)
class StoredMemory:
    """What more blocks take that keep their activations where memory allows."""

    peak_bytes: tuple[int, ...]
    """Of a token at the peak of a pass, by how many layers keep their activations."""
    layer_bytes: int
    """Of a token's activations in the largest layer."""
    input_bytes: int
    """Of a token's input of a layer."""
    weight_bytes: int
    """Of a layer, dequantised."""

    @classmethod
    def read(
        cls, shapes: Any, config: RunConfig, targets: set[str], element_bytes: int
    ) -> "StoredMemory | None":
        """Read the sizes from a base's text config; None: memory decides nothing.

        Args:
            shapes: The base's text config.
            config: The run's config.
            targets: Names of the adapted layers.
            element_bytes: Bytes of an element.
        """
        if config.trainer.gradient_checkpointing != "partial":
            return None
        layers = _layer_elements(shapes, config, targets)
        peaks = []
        for layer_count in range(len(layers) + 1):
            stored, passing, _ = decoder_elements(shapes, config, targets, layer_count)
            peaks.append(element_bytes * (stored + passing))
        return cls(
            peak_bytes=tuple(peaks),
            layer_bytes=element_bytes * max(layers),
            input_bytes=element_bytes * shapes.hidden_size,
            weight_bytes=element_bytes * block_weight_count(shapes),
        )

    @property
    def layers(self) -> int:
        """Layers of the base."""
        return len(self.peak_bytes) - 1

    def count_layers(self, slots: int, tokens: float, usable: float) -> int:
        """Return how many layers keep their activations.

        Args:
            slots: Slots of a pass.
            tokens: In the pass.
            usable: Bytes for all that the layers allocate.
        """
        block = BlockMemory(
            activations=int(tokens * self.layer_bytes),
            block_input=int(tokens * self.input_bytes),
            weights=self.weight_bytes,
        )
        return count_most(self.layers, slots, block, int(usable))

    def additional_bytes(self, slots: int, tokens: float, usable: float) -> int:
        """Return the bytes that they take beyond those of the fewest layers.

        Args:
            slots: As in `count_layers`.
            tokens: As in `count_layers`.
            usable: As in `count_layers`.
        """
        most = self.count_layers(slots, tokens, usable)
        fewest = count_fewest(self.layers, slots)
        # With one delta net more, what its backward pass needs within itself is there already.
        return max(0, int(tokens * (self.peak_bytes[most] - self.peak_bytes[fewest])))


def block_weight_count(shapes: Any) -> int:
    """Return the weights of the linear layers of the first block."""
    first = widths_by_layer(shapes)[0]
    columns = 2 * (first.queries + first.keys) + 3 * first.inner
    return first.hidden * columns


def decoder_elements(
    shapes: Any,
    config: RunConfig,
    targets: set[str],
    stored_layers: int,
    blocks: range | None = None,
) -> tuple[int, int, int]:
    """Count the elements of each token.

    Args:
        shapes: The base's text config.
        config: The run's config.
        targets: Names of the adapted layers.
        stored_layers: How many layers keep their activations.
        blocks: On the GPU; None: all.

    Returns:
        What the forward pass keeps for the backward pass, what that needs within it, and what
        evaluation needs.
    """
    widths = widths_by_layer(shapes)
    adapters = _Adapters(config.lora.largest_rank, targets)
    delta_nets = _DeltaNets.read(shapes)
    inputs = _PerLayerInputs.read(shapes, DECODER_BLOCKS[shapes.model_type])
    layers = _layer_elements(shapes, config, targets)
    largest = max(layers)
    hidden = widths[0].hidden
    inner = max(layer.inner for layer in widths)
    throughout = inputs.throughout(adapters) + _shared_heads(shapes, widths)
    # One layer at a time.
    evaluating = largest + hidden + inner + throughout
    recomputed = len(layers) - stored_layers
    here = blocks or range(len(layers))
    stored = layers[max(here.start, recomputed) : here.stop]
    # Within most layers, the forward and backward pass of the gate are the widest; of layers that
    # are wider than the first (Gemma 4), the gradient of the gate's product is.
    passing = max(3 * hidden + 2 * widths[0].inner, 4 * hidden + inner)
    # Any layer may be the one that is computed again, when those that were stored are freed.
    passing += max(0, largest - sum(stored))
    if delta_nets is not None:
        # The layers above the last delta net have been freed before its backward pass.
        above = delta_nets.layers_above(here)
        remaining = max(1, len(stored) - above)
        below = layers[here.start : here.stop - above]
        of_delta_net = sum(below[-remaining:]) + 2 * hidden + delta_nets.passing()
        passing = max(passing, of_delta_net - sum(stored))
    layer_inputs = (len(here) - len(stored)) * hidden
    return layer_inputs + sum(stored) + throughout, passing, evaluating


def _layer_elements(shapes: Any, config: RunConfig, targets: set[str]) -> list[int]:
    """What each layer keeps."""
    block = DECODER_BLOCKS[shapes.model_type]
    adapters = _Adapters(config.lora.largest_rank, targets)
    delta_nets = _DeltaNets.read(shapes)
    inputs = _PerLayerInputs.read(shapes, block)
    layers = []
    for number, layer in enumerate(widths_by_layer(shapes)):
        if delta_nets is not None and delta_nets.replaces_attention[number]:
            attention = delta_nets.elements(layer, adapters)
        else:
            attention = _attention_elements(layer, adapters, block)
        feed_forward = _feed_forward_elements(layer, adapters, block)
        layers.append(attention + feed_forward + inputs.of_layer(layer, adapters))
    return layers


def _attention_elements(
    widths: Widths, adapters: _Adapters, block: DecoderBlock
) -> int:
    norm_inputs = widths.hidden
    if block.attention_output_norm is not None:
        norm_inputs += widths.hidden
    if block.has_head_norms:
        norm_inputs += widths.queries + widths.keys
    if block.has_value_norm:
        norm_inputs += widths.keys
    gate = widths.queries if block.has_output_gate else 0
    heads = 2 * widths.queries + 2 * widths.keys
    projections = block.qkv[:1] if widths.shares_keys else block.qkv
    inputs = adapters.elements(projections, widths.hidden)
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


def _shared_heads(shapes: Any, widths: list[Widths]) -> int:
    """Keys and values that later layers use, and the float32 sums of their gradients."""
    if not any(layer.shares_keys for layer in widths):
        return 0
    keys: dict[str, int] = {}
    for layer_type, layer in zip(shapes.layer_types, widths, strict=True):
        if not layer.shares_keys:
            keys[layer_type] = layer.keys
    # Of keys and of values; a float32 is two elements of 16 bits.
    return 2 * (1 + 2) * sum(keys.values())


@dataclass(frozen=True)
class _PerLayerInputs:
    """The per-layer inputs of Gemma 4; other bases have none."""

    layers: int
    columns: int
    """Of one layer; 0: there are none."""

    @classmethod
    def read(cls, shapes: Any, block: DecoderBlock) -> "_PerLayerInputs":
        """Read them from a text config."""
        columns = 0
        if has_per_layer_inputs(shapes, block):
            columns = shapes.hidden_size_per_layer_input
        return cls(shapes.num_hidden_layers, columns)

    def of_layer(self, widths: Widths, adapters: _Adapters) -> int:
        """What a layer keeps of its part."""
        if not self.columns:
            return 0
        gate_inputs = adapters.elements(("per_layer_input_gate",), widths.hidden)
        products = adapters.rank_columns(("per_layer_projection",))
        # The output of the projection is a norm's input.
        return gate_inputs + self.columns + products + widths.hidden

    def throughout(self, adapters: _Adapters) -> int:
        """What is kept from the first layer's forward pass to its backward pass."""
        if not self.columns:
            return 0
        inputs = self.layers * self.columns
        projected = adapters.elements(("per_layer_model_projection",), inputs)
        return inputs + projected


@dataclass(frozen=True)
class _DeltaNets:
    """Layers with a gated delta net in place of attention (Qwen 3.5)."""

    replaces_attention: list[bool]
    """Of each layer."""
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
        replaces_attention = [kind == "linear_attention" for kind in layer_types]
        if not any(replaces_attention):
            return None
        heads: int = shapes.linear_num_value_heads
        return cls(
            replaces_attention=replaces_attention,
            keys=shapes.linear_num_key_heads * shapes.linear_key_head_dim,
            values=heads * shapes.linear_value_head_dim,
            heads=heads,
            key_columns=shapes.linear_key_head_dim,
        )

    def layers_above(self, layers: range) -> int:
        """Of consecutive layers, those with attention above the last delta net."""
        above = [self.replaces_attention[number] for number in reversed(layers)]
        return above.index(True) if True in above else len(layers)

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
        # Queries and keys of their final length; the gradient of the output, and corrections.
        operands = 2 * self.keys + 2 * self.values
        head_gradients = 2 * self.heads * self.key_columns
        return 2 * mixed + operands + states + head_gradients


def block_weights(shapes: Any, config: RunConfig) -> int:
    """Return the dequantised weights of a block that several slots keep with checkpointing.

    They are kept from the block's second forward pass to its backward pass.
    """
    checkpointing = bool(config.trainer.checkpointing)
    if not (checkpointing and config.quantization.load_in_4bit):
        return 0
    block = DECODER_BLOCKS[shapes.model_type]
    weights = [_layer_weights(layer, block) for layer in widths_by_layer(shapes)]
    inputs = _PerLayerInputs.read(shapes, block)
    hidden: int = shapes.hidden_size
    return max(weights) + 2 * hidden * inputs.columns


def _layer_weights(widths: Widths, block: DecoderBlock) -> int:
    attention = 2 * (widths.queries + widths.keys)
    # The last product is computed again only where a norm follows it.
    feed_forward = (3 if block.feed_forward_output_norm else 2) * widths.inner
    return widths.hidden * (attention + feed_forward)
