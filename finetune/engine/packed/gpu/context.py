"""What the layers of the GPU decoder share during one pass."""

from dataclasses import dataclass, field

import torch

from finetune.engine.packed.gpu.adapter_tables import AdapterTables
from finetune.engine.packed.gpu.attention import SpanTables
from finetune.engine.packed.gpu.delta_rule import RowTables
from finetune.engine.packed.gpu.shared_heads import SharedHeads


@dataclass(frozen=True)
class PassContext:
    """One forward and backward pass: its tokens, the slots' adapters, the rotary embedding."""

    input_ids: torch.Tensor
    """[tokens]."""
    position_ids: torch.Tensor
    """Position of each token in its row [tokens]."""
    slots: int
    """That train or are evaluated."""
    spans: SpanTables
    adapters: AdapterTables
    adapted_layers: frozenset[str]
    """Names of the linear layers that have an adapter in some slot."""
    angles: dict[str | None, tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict
    )
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

    elsewhere: dict[torch.device, "PassContext"] = field(default_factory=dict)
    """The same on the other GPUs that hold blocks of the base."""

    def on(self, device: torch.device) -> "PassContext":
        """Return the pass as the blocks on a device need it."""
        return self.elsewhere.get(device, self)

    def tensors(self) -> list[torch.Tensor]:
        """What differs between two passes of the same size."""
        tensors = [self.input_ids, self.position_ids]
        tensors += self.spans.tensors() + self.adapters.tensors()
        if self.rows is not None:
            tensors += self.rows.tensors()
        if self.query_scales is not None:
            tensors.append(self.query_scales)
        return tensors
