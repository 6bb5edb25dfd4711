"""Attention of a packed batch for the autograd backend, by PyTorch's own operations.

On a recent GPU in 16 bits it is PyTorch's variable-length attention (`varlen_attention`), otherwise
attention of padded spans (`padded_attention`).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AttentionInterface

from finetune.compat import attention_implementation
from finetune.engine.packed.batch import PackedBatch
from finetune.engine.packed.padded_attention import (
    Buckets,
    Scores,
    attend_padded,
    make_buckets,
)
from finetune.engine.packed.varlen_attention import (
    MAX_HEAD_DIM,
    VarlenBounds,
    attend_varlen,
    varlen_bounds,
)
from finetune.model.device import is_ampere_or_later

ATTENTION = "packed"
"""The name under which this attention is registered with transformers."""

WITHOUT_EFFECT = {
    "position_ids",
    "cache_position",
    "past_key_values",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
}
"""Arguments that models pass on to attention, and that no attention function computes with."""


class PackedAttention:
    """Attention of one packed batch. What depends on the layout alone is computed once."""

    def __init__(self, batch: PackedBatch) -> None:
        self._spans = batch.spans
        self._tokens = batch.input_ids.shape[1]
        self._bounds: dict[torch.device, VarlenBounds] = {}
        self._buckets: dict[torch.device, Buckets] = {}

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scores: Scores,
    ) -> torch.Tensor:
        """Compute the attention of every span to itself and its shared prefix.

        Args:
            query: [tokens, heads, head_dim].
            key: [tokens, key/value heads, head_dim].
            value: [tokens, key/value heads, value_dim].
            scores: What is peculiar to the layer.

        Returns:
            [tokens, heads, value_dim].
        """
        if _fits_varlen(query, value, scores):
            return attend_varlen(
                query,
                key,
                value,
                self._bounds_on(query.device),
                scores.scale,
                scores.window,
            )
        return attend_padded(query, key, value, self._buckets_on(query.device), scores)

    # Each of the two when a layer needs it first, then for all layers of the pass on its device.

    def _bounds_on(self, device: torch.device) -> VarlenBounds:
        if device not in self._bounds:
            self._bounds[device] = varlen_bounds(self._spans, device)
        return self._bounds[device]

    def _buckets_on(self, device: torch.device) -> Buckets:
        if device not in self._buckets:
            self._buckets[device] = make_buckets(self._spans, self._tokens, device)
        return self._buckets[device]


def _fits_varlen(query: torch.Tensor, value: torch.Tensor, scores: Scores) -> bool:
    """Whether PyTorch's variable-length attention computes these scores here."""
    head_dim = query.shape[-1]
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and is_ampere_or_later(query.device)
        and scores.softcap is None
        and scores.sinks is None
        and head_dim == value.shape[-1]
        and head_dim <= MAX_HEAD_DIM
    )


@contextlib.contextmanager
def use_packed_attention(config: Any, attention: PackedAttention) -> Iterator[None]:
    """Let a decoder attend within the rows of a packed batch.

    Args:
        config: The decoder's config, which its attention modules share. It holds the batch's
            attention meanwhile: not every decoder passes further arguments on to its attention.
        attention: That of the batch.
    """
    with attention_implementation(config, ATTENTION):
        config.packed_attention = attention
        try:
            yield
        finally:
            del config.packed_attention


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' models call it.

    Args:
        module: The attention module.
        query: [1, heads, tokens, head_dim].
        key: [1, key/value heads, tokens, head_dim].
        value: [1, key/value heads, tokens, value_dim].
        attention_mask: Of the model's own making; there is none by transformers' mask functions.
        dropout: Of attention weights.
        scaling: Factor of the scores.
        sliding_window: Tokens that a query sees.
        softcap: Bound of the scores.
        s_aux: Sinks [heads].
        is_causal: Whether a query sees no later tokens; None: as the module says.
        others: Further arguments of the model.

    Returns:
        [1, tokens, heads, value_dim], and no attention weights.

    Raises:
        NotImplementedError: The model's attention has a feature that is not computed here.
    """
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    refused = {
        "attention_mask": attention_mask is not None,
        "dropout": bool(dropout),
        "is_causal=False": not is_causal,
    }
    for name, other in others.items():
        # Whether a model passes an argument that it does not use, or leaves it out, is the same.
        refused[name] = name not in WITHOUT_EFFECT and other not in (None, False)
    for name, is_refused in refused.items():
        if is_refused:
            raise NotImplementedError(f"attention with {name}")
    # A packed batch is one sequence, so transformers' batch dimension has the size 1.
    q = query.squeeze(0).transpose(0, 1)
    k = key.squeeze(0).transpose(0, 1)
    v = value.squeeze(0).transpose(0, 1)
    scores = Scores(scaling, sliding_window, softcap, s_aux)
    output = module.config.packed_attention.attend(q, k, v, scores)
    return output[None], None


AttentionInterface.register(ATTENTION, _attention)
