"""Attention of a packed batch for the autograd backend, by PyTorch's own operations.

On a recent GPU in 16 bits: one call of PyTorch's variable-length attention. Otherwise spans of
about the same length are padded together, one call of scaled dot-product attention for each such
bucket.
"""

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import embedding, scaled_dot_product_attention
from transformers import AttentionInterface

from finetune.engine.packed.batch import PackedBatch, Span
from finetune.model.device import is_ampere_or_later

MAX_LENGTH_RATIO = 1.5
"""Spans in one bucket differ in length by at most this factor (plus 16 tokens)."""

ATTENTION = "packed"
"""The name under which this attention is registered with transformers."""


@dataclass(frozen=True)
class _Bucket:
    """Spans of about the same length, padded: indices of tokens in the packed batch."""

    queries: torch.Tensor
    """[spans, longest span]"""
    keys: torch.Tensor
    """[spans, longest span with its prefix]"""
    distance: torch.Tensor
    """Position of the query minus that of the key [spans, 1, queries, keys]; negative: the key
    comes later, or is padding."""

    @functools.cached_property
    def causal_mask(self) -> torch.Tensor:
        """True where a query attends to a key."""
        return self.distance >= 0

    def mask(self, window: int | None) -> torch.Tensor:
        """The causal mask, limited to a sliding window of that many tokens."""
        if window is None:
            return self.causal_mask
        return self.causal_mask & (self.distance < window)


@dataclass(frozen=True)
class _Buckets:
    buckets: list[_Bucket]
    output_indices: torch.Tensor
    """Where the output of each token is in the buckets' outputs, one after another [tokens]."""


@dataclass(frozen=True)
class _VarlenBounds:
    """Boundaries of the spans, as variable-length attention takes them."""

    query_offsets: torch.Tensor
    """[spans + 1], int32."""
    key_offsets: torch.Tensor
    """[spans + 1], int32."""
    max_queries: int
    max_keys: int
    key_indices: torch.Tensor | None
    """The token of each key, where prefixes are shared and so repeated; None: all in order."""


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
        if query.dtype in (torch.bfloat16, torch.float16) and is_ampere_or_later(query.device):
            return self._attend_varlen(query, key, value, scale, window)
        return self._attend_padded(query, key, value, scale, window)

    def _attend_padded(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        tokens, heads, head_dim = query.shape
        flat_query = query.reshape(tokens, -1)
        flat_key = key.reshape(tokens, -1)
        flat_value = value.reshape(tokens, -1)
        outputs = []
        for bucket in self._buckets.buckets:
            q = _gather(flat_query, bucket.queries, head_dim)
            k = _repeat_heads(_gather(flat_key, bucket.keys, head_dim), heads)
            v = _repeat_heads(_gather(flat_value, bucket.keys, head_dim), heads)
            mask = bucket.mask(window)
            output = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
            outputs.append(output.transpose(1, 2).flatten(2).flatten(0, 1))
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return embedding(self._buckets.output_indices, joined).view(query.shape)

    def _attend_varlen(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        bounds = self._varlen_bounds
        if bounds.key_indices is not None:
            key = key[bounds.key_indices]
            value = value[bounds.key_indices]
        window_size = (-1 if window is None else window - 1, 0)
        output = varlen_attn(
            query,
            key,
            value,
            bounds.query_offsets,
            bounds.key_offsets,
            bounds.max_queries,
            bounds.max_keys,
            scale=scale,
            window_size=window_size,
            **_grouped_query_argument(),
        )
        assert isinstance(output, torch.Tensor)  # a pair only if auxiliary outputs are requested
        return output

    @functools.cached_property
    def _buckets(self) -> _Buckets:
        output_indices = torch.empty(self._tokens, dtype=torch.long)
        buckets = []
        offset = 0
        for spans in _group_by_length(self._spans):
            longest = spans[0].length
            for number, span in enumerate(spans):
                first_output = offset + number * longest
                output_indices[span.start : span.stop] = torch.arange(span.length) + first_output
            buckets.append(_make_bucket(spans, self._device))
            offset += len(spans) * longest
        return _Buckets(buckets, output_indices.to(self._device))

    @functools.cached_property
    def _varlen_bounds(self) -> _VarlenBounds:
        queries = torch.tensor([0] + [span.length for span in self._spans])
        keys = torch.tensor([0] + [span.length + span.prefix_length for span in self._spans])
        key_indices = None
        if any(span.prefix_length for span in self._spans):
            indices = torch.cat([_key_indices(span) for span in self._spans])
            key_indices = indices.to(self._device)
        return _VarlenBounds(
            query_offsets=queries.cumsum(0).to(self._device, torch.int32),
            key_offsets=keys.cumsum(0).to(self._device, torch.int32),
            max_queries=int(queries.max()),
            max_keys=int(keys.max()),
            key_indices=key_indices,
        )


def _group_by_length(spans: list[Span]) -> list[list[Span]]:
    """Group spans, the longest first, so that little of a group is padding."""
    groups: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: -span.length):
        if groups and groups[-1][0].length <= MAX_LENGTH_RATIO * span.length + 16:
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups


def _make_bucket(spans: list[Span], device: torch.device) -> _Bucket:
    """Pad spans, the longest first, to a common length."""
    query_count = spans[0].length
    key_count = max(span.prefix_length + span.length for span in spans)
    # Padding repeats the span's own first token: that of another run might be NaN.
    starts = torch.tensor([[span.start] for span in spans])
    queries = starts.repeat(1, query_count)
    keys = starts.repeat(1, key_count)
    for number, span in enumerate(spans):
        queries[number, : span.length] = torch.arange(span.start, span.stop)
        keys[number, : span.prefix_length + span.length] = _key_indices(span)
    prefix_lengths = torch.tensor([span.prefix_length for span in spans])[:, None, None]
    distance = torch.arange(query_count)[:, None] + prefix_lengths - torch.arange(key_count)
    return _Bucket(queries.to(device), keys.to(device), distance[:, None].to(device))


def _key_indices(span: Span) -> torch.Tensor:
    """The tokens that a span's last query attends to: its prefix and the span itself."""
    prefix = torch.arange(span.prefix_start, span.prefix_stop)
    return torch.cat([prefix, torch.arange(span.start, span.stop)])


def _gather(states: torch.Tensor, indices: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Gather a bucket's tokens: [tokens, heads · head_dim] to [spans, heads, length, head_dim].

    The gradient of `embedding` sums over the rows that share a prefix.
    """
    padded = embedding(indices, states)
    return padded.view(*padded.shape[:2], -1, head_dim).transpose(1, 2)


def _repeat_heads(states: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeat key/value heads for grouped-query attention [spans, heads, length, head_dim]."""
    if states.shape[1] == heads:
        return states
    return states.repeat_interleave(heads // states.shape[1], dim=1)


@functools.cache
def _grouped_query_argument() -> dict[str, Any]:
    """From torch 2.13 on, variable-length attention must be asked for grouped queries."""
    parameters = inspect.signature(varlen_attn).parameters
    return {"enable_gqa": True} if "enable_gqa" in parameters else {}


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
    q = query.squeeze(0).transpose(0, 1)
    k = key.squeeze(0).transpose(0, 1)
    v = value.squeeze(0).transpose(0, 1)
    return packed_attention.attend(q, k, v, scaling, sliding_window)[None], None


AttentionInterface.register(ATTENTION, _attention)
