"""Attention of a packed batch for the autograd backend, by PyTorch's own operations.

On a recent GPU in 16 bits it is PyTorch's variable-length attention (`varlen_attention`), otherwise
scaled dot-product attention of padded spans (`padded_attention`).
"""

import functools
from typing import Any

import torch
from transformers import AttentionInterface

from finetune.engine.packed.batch import PackedBatch
from finetune.engine.packed.padded_attention import Buckets, attend_padded, make_buckets
from finetune.engine.packed.varlen_attention import (
    VarlenBounds,
    attend_varlen,
    varlen_bounds,
)
from finetune.model.device import is_ampere_or_later

ATTENTION = "packed"
"""The name under which this attention is registered with transformers."""


class PackedAttention:
    """Attention of one packed batch. What depends on the layout alone is computed once."""

    def __init__(self, batch: PackedBatch) -> None:
        self._spans = batch.spans
        self._tokens = batch.input_ids.shape[1]
        self._device = batch.input_ids.device

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """Compute the attention of every span to itself and its shared prefix.

        Args:
            query: [tokens, heads, head_dim].
            key: [tokens, key/value heads, head_dim].
            value: As the key.
            scale: Factor of the scores; None: 1 / √head_dim.
            window: Tokens that a query sees, itself included; None: all before it.

        Returns:
            [tokens, heads, head_dim].
        """
        has_16_bits = query.dtype in (torch.bfloat16, torch.float16)
        if has_16_bits and is_ampere_or_later(query.device):
            return attend_varlen(query, key, value, self._varlen_bounds, scale, window)
        return attend_padded(query, key, value, self._buckets, scale, window)

    # Each of the two when a layer needs it first, then for all layers of the pass.

    @functools.cached_property
    def _varlen_bounds(self) -> VarlenBounds:
        return varlen_bounds(self._spans, self._device)

    @functools.cached_property
    def _buckets(self) -> Buckets:
        return make_buckets(self._spans, self._tokens, self._device)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    *,
    packed_attention: PackedAttention,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' models call it.

    Args:
        module: The attention module.
        query: [1, heads, tokens, head_dim].
        key: [1, key/value heads, tokens, head_dim].
        value: As the key.
        attention_mask: Not used.
        scaling: Factor of the scores.
        sliding_window: Tokens that a query sees.
        packed_attention: Passed through from the call of the decoder.

    Returns:
        [1, tokens, heads, head_dim], and no attention weights.
    """
    # A packed batch is one sequence, so transformers' batch dimension has the size 1.
    q = query.squeeze(0).transpose(0, 1)
    k = key.squeeze(0).transpose(0, 1)
    v = value.squeeze(0).transpose(0, 1)
    output = packed_attention.attend(q, k, v, scaling, sliding_window)
    return output[None], None


AttentionInterface.register(ATTENTION, _attention)
