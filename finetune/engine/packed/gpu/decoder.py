"""The backend on a GPU: a base's decoder with hand-written kernels.

A run alone is limited by how fast operations can be launched, so there are few of them: norms, the
gate's product and the rotary embedding are one kernel each (`rms_norm`, `gated_product`, `rotary`),
the adapters of all slots are computed at once (`lowrank`), and attention stays within each row
without padding (`attention`). What the blocks are made of says `model.decoder_blocks`.

With gradient checkpointing (Chen et al., 2016) a block keeps only its input and is computed again
for its backward pass, except for its last product, which no gradient needs. The last blocks keep
all activations (`stored_blocks`).
"""

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from finetune.engine.packed.batch import PackedBatch
from finetune.engine.packed.gpu.adapter_tables import (
    COLUMNS,
    AdapterSpan,
    AdapterTables,
    SlotTable,
)
from finetune.engine.packed.gpu.attention import SpanTables
from finetune.engine.packed.gpu.block import Block, BlockActivations
from finetune.engine.packed.gpu.context import PassContext
from finetune.engine.packed.gpu.cross_entropy import cross_entropy
from finetune.engine.packed.gpu.delta_rule import RowTables
from finetune.engine.packed.gpu.pass_size import PassSize, padding_span, pass_size
from finetune.engine.packed.gpu.per_layer_input import (
    PerLayerEmbedding,
    ProjectionActivations,
)
from finetune.engine.packed.gpu.query_scales import query_scales
from finetune.engine.packed.gpu.recorded_pass import PassRecorder, RecordedPass
from finetune.engine.packed.gpu.rms_norm import (
    read_norm,
    rms_norm,
    rms_norm_backward,
)
from finetune.model.architectures import text_config_of
from finetune.model.decoder_blocks import decoder_block_of, has_per_layer_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetune.engine.packed.slot import Slot


def stored_blocks(layers: int, slots: int) -> int:
    """How many of the last blocks keep all activations under gradient checkpointing.

    The very last one does, because its backward pass comes at once. With several slots, which
    need room for as many batches anyway, an eighth of the blocks do.

    Args:
        layers: Blocks of the decoder.
        slots: Slots that train together.

    Returns:
        A number of blocks, at least 1.
    """
    if slots == 1:
        return 1
    return max(1, layers // 8)


@dataclass
class BlocksTrace:
    """What the blocks' forward pass keeps for their backward pass, which consumes it."""

    context: PassContext
    blocks: list[BlockActivations | torch.Tensor]
    """The activations of each block, or its input to recompute them from."""
    per_layer: ProjectionActivations | None
    """Of what computes per-layer inputs; None: no adapter stands there."""


@dataclass
class Trace:
    """What a forward pass keeps for its backward pass, which consumes it."""

    prediction_positions: torch.Tensor
    """See `PackedBatch`."""
    blocks: BlocksTrace | RecordedPass
    hidden: torch.Tensor
    """Input of the last norm [answer tokens, hidden_size]."""
    inverse_rms: torch.Tensor
    """Of the last norm [answer tokens]."""
    tokens: int


class Decoder:
    """Implements `Backend`: embedding, blocks and last norm, without autograd."""

    logits_chunk = 1024
    """With fewer answer tokens at once, their matrix products leave a large GPU half idle."""

    def __init__(self, base: "PreTrainedModel", gradient_checkpointing: bool) -> None:
        """Read the base's layers; the base itself is not changed.

        Args:
            base: A base that `supports_gpu_decoder`.
            gradient_checkpointing: Recompute activations in the backward pass.
        """
        block = decoder_block_of(base.config)
        assert block is not None
        config = text_config_of(base.config)
        model = base.get_decoder()
        prefix = base.base_model_prefix
        self._position_kinds = block.position_kinds
        self._embedding = model.embed_tokens
        self._rotary = model.rotary_emb
        self._norm = read_norm(model.norm, block)
        self._gradient_checkpointing = gradient_checkpointing
        self._scaled_config = config if block.scales_queries else None
        # Quantised layers are linear layers too. In the order of the modules, so that layers with
        # the same input have consecutive rows, as `linear_group` needs them.
        linear_names = []
        for name, module in model.named_modules(prefix=prefix):
            if isinstance(module, torch.nn.Linear):
                linear_names.append(name)
        self._table_rows = {name: row for row, name in enumerate(linear_names)}
        """Each linear layer's row in the slots' tables."""
        self._per_layer: PerLayerEmbedding | None = None
        if has_per_layer_inputs(config, block):
            self._per_layer = PerLayerEmbedding(model, prefix, self._table_rows, block)
        layer_types: list[str | None] = [None] * len(model.layers)
        if block.rotary_by_layer_type:
            layer_types = list(config.layer_types)
        self._layer_types = sorted(set(layer_types), key=str)
        self._head_dims = {
            module.self_attn.head_dim
            for module in model.layers
            if hasattr(module, "self_attn")
        }
        self._has_delta_nets = any(
            hasattr(module, "linear_attn") for module in model.layers
        )
        self._blocks: list[Block] = []
        for number, module in enumerate(model.layers):
            name = f"{prefix}.layers.{number}"
            layer_type = layer_types[number]
            self._blocks.append(
                Block(module, name, self._table_rows, config, block, layer_type)
            )
        block_weights = sum(
            module.in_features * module.out_features
            for module in model.layers[0].modules()
            if isinstance(module, torch.nn.Linear)
        )
        self._recorder = PassRecorder(block_weights)

    score = staticmethod(cross_entropy)

    def release_memory(self) -> bool:
        """See `Backend.release_memory`."""
        return self._recorder.stop()

    def attach(self, slot: "Slot") -> None:
        """Set `slot.kernel_table`."""
        # All zero in the row of a layer without an adapter: rank 0 stands for none.
        table = torch.zeros(len(self._table_rows), COLUMNS, dtype=torch.int64)
        for name, adapter in slot.adapters.items():
            row = self._table_rows[name]
            table[row] = torch.tensor(adapter.table_row())
        slot.kernel_table = SlotTable.of(table, slot.vector.device)

    @torch.no_grad()
    def forward(
        self,
        batch: PackedBatch,
        slots: "Sequence[Slot]",
        dropout_steps: Sequence[int] | None,
    ) -> tuple[torch.Tensor, Trace]:
        """See `Backend.forward`."""
        # Steps are given in training only.
        trains = bool(dropout_steps)
        size = None
        if trains and self._recorder.is_worthwhile(batch):
            size = pass_size(batch)
        context = self._context(batch, slots, dropout_steps, size)
        # Not recorded: noise may be added to it (`embedding_noise`).
        x: torch.Tensor = self._embedding(context.input_ids[None])[0]
        x, trace = self._compute_blocks(x, context, size, trains)
        # The last norm and the head see no other positions: only these have a loss.
        hidden = x[batch.prediction_positions]
        normalized, inverse_rms, _ = rms_norm(hidden, self._norm)
        return normalized, Trace(
            prediction_positions=batch.prediction_positions,
            blocks=trace,
            hidden=hidden,
            inverse_rms=inverse_rms,
            tokens=len(x),
        )

    def _compute_blocks(
        self,
        x: torch.Tensor,
        context: PassContext,
        size: PassSize | None,
        trains: bool,
    ) -> tuple[torch.Tensor, BlocksTrace | RecordedPass]:
        """Replay the blocks' forward pass if it is recorded for this size, else launch it."""
        if size is None:
            return self.forward_blocks(x, context, trains)
        recorded = self._recorder.find(self, size, x, context)
        if recorded is not None:
            return recorded.forward(x, context), recorded
        before = torch.cuda.memory_allocated()
        output, trace = self.forward_blocks(x, context, trains)
        memory = torch.cuda.memory_allocated() - before
        self._recorder.remember(size, x, context, memory)
        return output, trace

    def forward_blocks(
        self, x: torch.Tensor, context: PassContext, trains: bool
    ) -> tuple[torch.Tensor, BlocksTrace]:
        """Compute all blocks.

        Only operations on the GPU, none of which the host waits for: it can be recorded.

        Args:
            x: The embeddings [tokens, hidden_size].
            context: The pass, without what is computed here.
            trains: Whether a backward pass follows.

        Returns:
            The last block's output [tokens, hidden_size], and the trace for `backward_blocks`.
        """
        angles = {kind: self._angles(x, context, kind) for kind in self._layer_types}
        context = dataclasses.replace(context, angles=angles, shared_heads={})
        per_layer = None
        if self._per_layer is not None:
            inputs, per_layer = self._per_layer.forward(x, context)
            context = dataclasses.replace(context, per_layer_inputs=inputs)
        layers = len(self._blocks)
        recomputed = 0
        if self._gradient_checkpointing:
            recomputed = layers - stored_blocks(layers, context.slots)
        stored: list[BlockActivations | torch.Tensor] = []
        for number, block in enumerate(self._blocks):
            output, activations = block.forward(x, context)
            assert output is not None
            x = output
            if trains and number < recomputed:
                stored.append(activations.block_input)
            elif trains:
                stored.append(activations)
            # Or they would outlive the next block's forward pass.
            del activations, output
        return x, BlocksTrace(context, stored, per_layer)

    def _context(
        self,
        batch: PackedBatch,
        slots: "Sequence[Slot]",
        dropout_steps: Sequence[int] | None,
        size: PassSize | None,
    ) -> PassContext:
        input_ids = batch.input_ids[0]
        position_ids = batch.position_ids[0]
        spans = batch.spans
        adapter_spans = _adapter_spans(batch, slots, dropout_steps)
        tables = [slot.kernel_table for slot in slots if slot.kernel_table is not None]
        if size is not None:
            padding = padding_span(batch, size)
            input_ids = pad(input_ids, (0, padding.length))
            position_ids = pad(position_ids, (0, padding.length))
            spans = [*spans, padding]
            # Its slot's table is empty.
            adapter_spans.append(
                AdapterSpan(padding.start, padding.stop, dropout_key=0, dropout=0.0)
            )
        layers_by_slot = [slot.adapters.keys() for slot in slots]
        adapted_layers: frozenset[str] = frozenset().union(*layers_by_slot)
        rows = None
        if self._has_delta_nets:
            rows = RowTables(spans, input_ids.device, size)
        return PassContext(
            input_ids=input_ids,
            position_ids=position_ids,
            slots=len(slots),
            spans=SpanTables(spans, position_ids, self._head_dims, size),
            adapters=AdapterTables(adapter_spans, tables, input_ids.device, size),
            adapted_layers=adapted_layers,
            rows=rows,
            query_scales=query_scales(self._scaled_config, spans, position_ids),
        )

    def _angles(
        self, x: torch.Tensor, context: PassContext, layer_type: str | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the rotary embedding [tokens, rotary_dim] of a type of layer."""
        positions = context.position_ids[None]
        if self._position_kinds > 1:
            positions = positions.expand(self._position_kinds, -1, -1)
        # Transformers' module reads no more of x than its dtype and device.
        if layer_type is None:
            cos, sin = self._rotary(x[None], positions)
        else:
            cos, sin = self._rotary(x[None], positions, layer_type)
        # Contiguous, because the kernels compute addresses from the sizes alone.
        return cos[0].contiguous(), sin[0].contiguous()

    @torch.no_grad()
    def backward(self, trace: Trace, gradient: torch.Tensor) -> None:
        """See `Backend.backward`."""
        # No name is bound to it here, so that `backward_blocks` can free it.
        if isinstance(trace.blocks, RecordedPass):
            trace.blocks.backward(self._output_gradient(trace, gradient))
        else:
            self.backward_blocks(trace.blocks, self._output_gradient(trace, gradient))

    def _output_gradient(self, trace: Trace, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of the blocks' output [tokens, hidden_size]."""
        # Positions that predict no answer token have no gradient of their own, but the blocks
        # below give them one: answers attend to them.
        grad = gradient.new_zeros(trace.tokens, gradient.shape[1])
        # An answer token is predicted at one position only, so nothing has to be summed.
        grad[trace.prediction_positions] = rms_norm_backward(
            gradient.contiguous(),
            trace.hidden,
            self._norm,
            trace.inverse_rms,
        )
        # Makes room.
        del trace.hidden
        return grad

    def backward_blocks(self, trace: BlocksTrace, grad: torch.Tensor) -> None:
        """Compute the gradients of the adapters, which go into the slots; as `forward_blocks`.

        Args:
            trace: From `forward_blocks`.
            grad: Gradient of its output [tokens, hidden_size]; overwritten.
        """
        # As in `stored_blocks`: several slots need room for as many batches anyway.
        cache_weights = trace.context.slots > 1
        for block in reversed(self._blocks):
            # Taken out of the trace, so that the activations are freed block by block.
            stored = trace.blocks.pop()
            weight_cache: dict[str, torch.Tensor] | None = None
            if cache_weights:
                weight_cache = {}
            context = dataclasses.replace(trace.context, weight_cache=weight_cache)
            if isinstance(stored, torch.Tensor):
                _, stored = block.forward(stored, context, recompute=True)
            is_first = not trace.blocks
            grad_x = block.backward(
                grad,
                stored,
                context,
                need_input_grad=not is_first,
            )
            if grad_x is not None:
                grad = grad_x
        if self._per_layer is not None and trace.per_layer is not None:
            gradients = trace.context.per_layer_inputs
            assert gradients is not None
            self._per_layer.backward(gradients, trace.per_layer, trace.context)


def _adapter_spans(
    batch: PackedBatch, slots: "Sequence[Slot]", dropout_steps: Sequence[int] | None
) -> list[AdapterSpan]:
    """Each slot's tokens, dropout, and the key of its dropout masks."""
    spans = []
    slot_spans = zip(slots, batch.batch_spans, strict=True)
    for number, (slot, (start, stop)) in enumerate(slot_spans):
        key = 0
        dropout = 0.0
        if dropout_steps:
            # Of the run's seed and its batch alone, whatever else trains beside it. Python hashes
            # a text that seeds its generator, so keys of consecutive batches are unrelated.
            generator = random.Random(f"{slot.seed} {dropout_steps[number]}")
            # Not 64 bits: the tables are signed.
            key = generator.getrandbits(63)
            dropout = slot.dropout
        span = AdapterSpan(
            start=start,
            stop=stop,
            dropout_key=key,
            dropout=dropout,
        )
        spans.append(span)
    return spans
