"""The tables of a pass: whose tokens are where, and each slot's adapters."""

import dataclasses
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from finetune.engine.packed.batch import PackedBatch
from finetune.engine.packed.gpu.adapter_tables import AdapterSpan, AdapterTables
from finetune.engine.packed.gpu.attention import SpanTables
from finetune.engine.packed.gpu.context import PassContext
from finetune.engine.packed.gpu.delta_rule import RowTables
from finetune.engine.packed.gpu.pass_size import PassSize, padding_span
from finetune.engine.packed.gpu.query_scales import query_scales
from finetune.model.decoder_blocks import DecoderBlock
from finetune.model.device import to_device

if TYPE_CHECKING:
    from finetune.engine.packed.slot import Slot


class ContextMaker:
    """Makes the context of each pass on one base."""

    def __init__(
        self,
        model: Any,
        config: Any,
        block: DecoderBlock,
        devices: Sequence[torch.device],
    ) -> None:
        """Read what the tables depend on.

        Args:
            model: Transformers' decoder.
            config: The base's text config.
            block: What the blocks are made of.
            devices: Of the blocks that a pass goes through, beside that of the first one.
        """
        self._scaled_config = config if block.scales_queries else None
        self._head_dims = {
            module.self_attn.head_dim
            for module in model.layers
            if hasattr(module, "self_attn")
        }
        self._has_delta_nets = any(
            hasattr(module, "linear_attn") for module in model.layers
        )
        self._devices = devices

    def make(
        self,
        batch: PackedBatch,
        slots: "Sequence[Slot]",
        dropout_steps: Sequence[int] | None,
        size: PassSize | None,
    ) -> PassContext:
        """Make the context of a pass.

        Args:
            batch: The packed batch.
            slots: One for each of `batch.batch_spans`.
            dropout_steps: See `Backend.forward`.
            size: To which the pass is padded; None: it is not.

        Returns:
            The context, without what the blocks compute for themselves.
        """
        device = batch.position_ids.device
        elsewhere = {
            other: self._make_on(other, batch, slots, dropout_steps, size)
            for other in self._devices
            if other != device
        }
        context = self._make_on(device, batch, slots, dropout_steps, size)
        return dataclasses.replace(context, elsewhere=elsewhere)

    def _make_on(
        self,
        device: torch.device,
        batch: PackedBatch,
        slots: "Sequence[Slot]",
        dropout_steps: Sequence[int] | None,
        size: PassSize | None,
    ) -> PassContext:
        input_ids = batch.input_ids[0]
        position_ids = batch.position_ids[0]
        if device != position_ids.device:
            # From the host: a copy from the first GPU would wait for what both have to compute.
            position_ids = to_device(batch.host_position_ids, device)
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
            rows = RowTables(spans, device, size)
        return PassContext(
            input_ids=input_ids,
            position_ids=position_ids,
            slots=len(slots),
            spans=SpanTables(spans, position_ids, self._head_dims, size),
            adapters=AdapterTables(adapter_spans, tables, device, size),
            adapted_layers=adapted_layers,
            rows=rows,
            query_scales=query_scales(self._scaled_config, batch.spans, position_ids),
        )


def _adapter_spans(
    batch: PackedBatch, slots: "Sequence[Slot]", dropout_steps: Sequence[int] | None
) -> list[AdapterSpan]:
    """Each slot's tokens, dropout, and the key of its dropout masks."""
    spans = []
    slot_spans = zip(slots, batch.batch_spans, strict=True)
    for number, (slot, (start, stop)) in enumerate(slot_spans):
        key = 0
        dropout = 0.0
        if dropout_steps and slot.dropout:
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
