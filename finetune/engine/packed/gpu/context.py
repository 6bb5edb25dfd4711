"""What the layers of the GPU decoder share during one pass."""

from dataclasses import dataclass, field

import torch

from finetune.engine.packed.batch import PackedBatch
from finetune.engine.packed.gpu.adapter_tables import AdapterTables
from finetune.engine.packed.gpu.attention import SpanTables
from finetune.engine.packed.gpu.delta_rule import RowTables
from finetune.engine.packed.gpu.shared_heads import SharedHeads


@dataclass(frozen=True)
class PassContext:
    """One forward and backward pass: its tokens, the slots' adapters, the rotary embedding."""

    batch: PackedBatch
    spans: SpanTables
    adapters: AdapterTables
    adapted_layers: frozenset[str]
    """Names of the linear layers that have an adapter in some slot."""
    angles: dict[str | None, tuple[torch.Tensor, torch.Tensor]]
    """Cosines and sines of the rotary embedding [tokens, rotary_dim], by the type of layer; of all
    layers under None where they have the same."""
    rows: RowTables | None = None
    """Of bases with gated delta nets."""
    query_scales: torch.Tensor | None = None
    """Factors of the queries by their positions [tokens, 1, 1]; None: all are 1."""
    shared_heads: dict[str | None, SharedHeads] = field(default_factory=dict)
    """Keys and values that later layers use too, by the type of layer."""
    per_layer_inputs: torch.Tensor | None = None
    """Of bases that have some [tokens, layers, columns]; the backward pass of a block overwrites
    its input by its gradient."""
    weight_cache: dict[str, torch.Tensor] | None = None
    """Dequantised weights of a block, by layer, from its recomputation to its backward pass; None:
    each of the two dequantises them."""
