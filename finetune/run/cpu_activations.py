"""The activations of a run on a CPU, in bytes, from the base's shapes and the rows of a batch.

Each term is a tensor that autograd keeps, or that a pass needs at its widest place. There are two
sets of terms: of the packed engine's fused layers, and of transformers' and PEFT's own code, which
TRL trains with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.config.schema import RunConfig
from finetune.data.token_file import Example
from finetune.engine.evaluation import rows_at_once
from finetune.engine.packed.autograd_backend import AutogradBackend
from finetune.engine.packed.losses import chunk_size
from finetune.engine.packed.padded_attention import smallest_window, stored_scores
from finetune.engine.packed.row_by_row import recurrent_layers
from finetune.engine.prediction import SCORED_TOKENS
from finetune.model.architectures import logit_transform_of
from finetune.model.quantization import compute_dtype
from finetune.run.batch_shape import BatchShape, packed_shape, padded_shape
from finetune.run.device_memory import Activations, BackwardMemory
from finetune.run.expert_costs import ExpertShape
from finetune.run.layer_widths import read_widths
from finetune.run.memory_costs import recurrent_elements

TRL_TOKENS = 4096
"""Most tokens, and columns of the vocabulary, of a tile of TRL's fused head (TRL 1.16)."""
TRL_COLUMNS = 32768
TRL_TILES = 8.25
"""Copies of a tile that the head's backward pass has at once: the tile, five intermediate values,
the targets in float32, one difference, and a mask of booleans."""


LLAMA_LAYERS = {
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
}  # fmt: skip
"""Linear layers of most architectures, of which some share an input."""


@dataclass(frozen=True)
class LayerShape:
    """What one decoder layer has for each token, in elements."""

    hidden: int
    queries: int
    keys: int
    inner: int
    norms: int
    """Inputs of all norms of the layer."""
    recurrent: int
    """What recurrent layers keep, on the average of all layers."""
    scores: int
    """Attention scores for each query and key: of attention with soft-capping or sinks."""
    experts: ExpertShape | None
    adapters: Mapping[str, tuple[int, int, int]]
    """Of adapted layers: input, output and rank, by the last part of their names."""

    @property
    def experts_stored(self) -> int:
        """What its experts keep for the backward pass, on the average of all layers."""
        return 0 if self.experts is None else int(self.experts.stored)

    @property
    def experts_passing(self) -> int:
        """What the backward pass of its experts needs."""
        return 0 if self.experts is None else self.experts.passing

    def adapts(self, *names: str) -> bool:
        """Whether any of these layers has an adapter."""
        return any(name in self.adapters for name in names)


@dataclass(frozen=True)
class BaseShape:
    """The sizes of a base."""

    layers: int
    vocabulary: int
    layer: LayerShape
    element: int
    """Bytes of an element of its activations."""
    caps_logits: bool
    """Whether the head's outputs are bounded."""


def cpu_activations(
    config: RunConfig,
    shapes: Any,
    adapted: Any,
    batches: Sequence[Sequence[Example]],
    evaluated: Sequence[Example],
    is_trl: bool,
) -> Activations:
    """Count a CPU's activations in bytes.

    Args:
        config: The run's config.
        shapes: The base's text config.
        adapted: The base with the adapter, without weights.
        batches: The rows of the training batches that may need most.
        evaluated: The longest rows that are evaluated, as many as the config asks for at once.
        is_trl: Whether TRL trains.
    """
    decoder = adapted.get_base_model().get_decoder()
    shares_prefixes = not recurrent_layers(decoder)
    window = smallest_window(decoder)
    scores = shapes.num_attention_heads * stored_scores(decoder)
    base = BaseShape(
        layers=shapes.num_hidden_layers,
        vocabulary=shapes.vocab_size,
        layer=_layer_shape(shapes, adapted, scores),
        element=compute_dtype(config.quantization).itemsize,
        caps_logits=logit_transform_of(shapes).cap is not None,
    )
    if is_trl:
        count = 0
        if evaluated:
            longest = max(len(row["input_ids"]) for row in evaluated)
            count = rows_at_once(longest, shapes.vocab_size, len(evaluated))
        counts = [trl_training(config, base, padded_shape(rows)) for rows in batches]
        evaluating = trl_evaluation(base, padded_shape(evaluated[:count]))
    else:
        counts = [
            packed_training(config, base, packed_shape(rows, shares_prefixes, window))
            for rows in batches
        ]
        shape = packed_shape(evaluated, shares_prefixes, window)
        evaluating = packed_evaluation(base, shape)
    stored, passing, head = max(counts, key=lambda count: count[0] + max(count[1:]))
    logits = max(0, head - passing)
    training = BackwardMemory(stored, passing)
    return Activations(
        single=training,
        packed=training,
        logits=logits,
        evaluating=max(0, evaluating - logits),
    )


def _layer_shape(shapes: Any, adapted: Any, scores: int) -> LayerShape:
    """Read a layer's norms and adapters from the base, whose layers are taken to be alike."""
    decoder = adapted.get_base_model().get_decoder()
    # Not of a vision tower, which computes nothing for text.
    widths = read_widths(shapes, decoder)
    adapters = {}
    norms = 0
    for name, module in decoder.named_modules():
        last = name.rsplit(".", 1)[-1]
        if "default" in getattr(module, "lora_A", {}):
            sizes = (module.in_features, module.out_features, module.r["default"])
            adapters[last] = sizes
        # Of the first layer.
        elif ".0." in name and type(module).__name__.endswith("Norm"):
            weight = getattr(module, "weight", None)
            if weight is None or weight.numel() == widths.hidden:
                norms += widths.hidden
            elif last.isdigit():  # of one head
                norms += weight.numel()
            else:  # of heads
                norms += widths.keys if last.startswith("k") else widths.queries
    return LayerShape(
        widths.hidden,
        widths.queries,
        widths.keys,
        widths.inner,
        norms,
        recurrent_elements(shapes),
        scores,
        widths.experts,
        adapters,
    )


Count = tuple[int, int, int]
"""Bytes that are stored for the backward pass, those that it needs itself at its widest place, and
those of the head, which is computed before it."""


def packed_training(config: RunConfig, base: BaseShape, batch: BatchShape) -> Count:
    """Count what a batch of the packed engine takes."""
    layer = base.layer
    # A norm keeps its input, a gate its two inputs, an adapted layer its input and that times A.
    elements = layer.norms + 2 * layer.inner + layer.recurrent
    elements += layer.experts_stored
    # In 8 bits bitsandbytes keeps the input of each layer.
    all_inputs = config.quantization.load_in_8bit
    if all_inputs or layer.adapts("q_proj", "k_proj", "v_proj"):
        elements += layer.hidden
    if all_inputs or layer.adapts("gate_proj", "up_proj"):
        elements += layer.hidden
    if all_inputs or layer.adapts("o_proj"):
        elements += layer.queries
    if all_inputs or layer.adapts("down_proj"):
        elements += layer.inner
    # Layers by other names, which are taken to share no input.
    for name, (width, _, _) in layer.adapters.items():
        if name not in LLAMA_LAYERS:
            elements += width
    elements += sum(rank for _, _, rank in layer.adapters.values())
    if config.lora.use_dora:
        # The input of each adapted layer, and its product before it is scaled.
        elements += sum(width for _, width, _ in layer.adapters.values())
    bytes_per_token = elements * base.element
    if config.lora.dropout:
        # A mask of booleans.
        bytes_per_token += sum(width for width, _, _ in layer.adapters.values())
    # Attention keeps padded queries and outputs, and keys and values repeated for all heads.
    padded = batch.attention
    attention = 2 * layer.queries * (padded.queries + padded.keys) * base.element
    attention += layer.scores * padded.scores * base.element
    stored = batch.tokens * bytes_per_token + attention
    # All layers share a mask.
    shared = padded.masks * base.element
    # The gradients of a layer's input and output, and within the gate that of its product, the
    # gradient of one input and one intermediate value; the product itself is freed by then.
    gate = 3 - layer.adapts("down_proj")
    if config.lora.dropout and layer.adapts("down_proj"):
        gate = 3  # the product masked, and the gradient of it, before it is freed
    feed_forward = max(gate * layer.inner, layer.experts_passing)
    passing = batch.tokens * (3 * layer.hidden + feed_forward) * base.element
    head = _packed_head(base, batch.answers)
    stored, passing, head = _count(config, base, batch.tokens, stored, passing, head)
    return stored + shared, passing, head


def packed_evaluation(base: BaseShape, batch: BatchShape) -> int:
    """Count what a batch of the packed engine takes without a backward pass."""
    head = _packed_head(base, batch.answers)
    return max(_evaluated(base, batch), head) + batch.attention.masks * base.element


def _count(
    config: RunConfig,
    base: BaseShape,
    tokens: int,
    stored: int,
    passing: int,
    head: int,
) -> Count:
    """Count a batch of which each layer keeps `stored`; with checkpointing, only its input."""
    # The last norm's input too.
    inputs = (base.layers + 1) * tokens * base.layer.hidden * base.element
    if config.trainer.checkpointing:
        # The layer whose backward pass runs has computed its activations again.
        return inputs, stored + passing, head
    return base.layers * stored + inputs // (base.layers + 1), passing, head


def _packed_head(base: BaseShape, answers: int) -> int:
    """Hidden states and their gradients, and the logits of one chunk in float32."""
    chunk = chunk_size(answers, AutogradBackend.logits_chunk) if answers else 0
    rounded = base.element if base.element < 4 else 0
    # Of capped logits a copy is kept for their gradient.
    copied = 4 if base.caps_logits else 0
    logits = chunk * base.vocabulary * (4 + rounded + copied)
    return 2 * answers * base.layer.hidden * base.element + logits


def _evaluated(base: BaseShape, batch: BatchShape) -> int:
    """A layer without a backward pass: the wider of feed-forward layer and attention."""
    layer = base.layer
    # Embeddings, the layer's input, what attention adds to, and a norm's output.
    states = 4 * layer.hidden
    inner = 3 * layer.inner
    if layer.experts is not None:
        inner = max(inner, layer.experts.evaluating)
    feed_forward = (states + inner) * batch.tokens
    projections = states + 2 * layer.queries + 4 * layer.keys
    attention = projections * batch.tokens
    attention += 2 * layer.queries * (batch.attention.queries + batch.attention.keys)
    # The scores themselves, where PyTorch computes them one by one.
    attention += layer.scores * batch.attention.scores
    return max(feed_forward, attention) * base.element


def trl_training(config: RunConfig, base: BaseShape, batch: BatchShape) -> Count:
    """Count what a batch of TRL's trainer takes."""
    layer = base.layer
    # Beside the packed engine's terms the gate keeps its activation, and each layer has a mask.
    elements = layer.norms + 4 * layer.queries + 3 * layer.inner + layer.recurrent
    elements += layer.experts_stored
    if config.lora.dropout:
        # Each adapter has its input masked, and the mask in float32.
        elements += sum(2 * width for width, _, _ in layer.adapters.values())
    else:
        elements += layer.hidden * layer.adapts("q_proj", "k_proj", "v_proj")
        elements += layer.hidden * layer.adapts("gate_proj", "up_proj")
        elements += layer.inner * layer.adapts("down_proj")
    elements += sum(rank for _, _, rank in layer.adapters.values())
    if config.lora.use_dora:
        # Both are multiplied by the magnitude: the base's output and the adapter's.
        elements += sum(2 * width for _, width, _ in layer.adapters.values())
    stored = (batch.tokens * elements + batch.attention.masks) * base.element
    feed_forward = max(3 * layer.inner, layer.experts_passing)
    passing = batch.tokens * (3 * layer.hidden + feed_forward) * base.element
    tile = min(batch.tokens, TRL_TOKENS) * min(base.vocabulary, TRL_COLUMNS) * 4
    states = 2 * batch.tokens * layer.hidden * base.element
    head = int(TRL_TILES * tile) + states
    return _count(config, base, batch.tokens, stored, passing, head)


def trl_evaluation(base: BaseShape, batch: BatchShape) -> int:
    """Count the logits of rows that are predicted at once, and of a chunk that is scored."""
    predicted = batch.tokens * base.vocabulary * base.element
    # Of padded rows, the tokens' own logits are a copy.
    copied = predicted if batch.attention.masks else 0
    scored = 2 * min(batch.tokens, SCORED_TOKENS) * base.vocabulary * 4
    return max(predicted + max(copied, scored), _evaluated(base, batch))
