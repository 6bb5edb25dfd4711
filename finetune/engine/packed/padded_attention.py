"""Attention of a packed batch by PyTorch's scaled dot-product attention, on any device.

Spans of about the same length are padded together into a bucket, and each bucket takes one call.
Scores that are soft-capped or have sinks are computed by single operations, as PyTorch's attention
has neither.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import embedding, scaled_dot_product_attention

from finetune.engine.packed.batch import Span

MAX_LENGTH_RATIO = 1.5
"""Spans in one bucket differ in length by at most this factor (plus 16 tokens)."""


@dataclass(frozen=True)
class Scores:
    """How attention turns queries and keys into weights."""

    scale: float | None = None
    """Factor of the scores; None: 1 / √head_dim."""
    window: int | None = None
    """Tokens that a query sees, itself included; None: all before it."""
    softcap: float | None = None
    """Scores are bounded by tanh to this number (Gemma 2); None: they are not."""
    sinks: torch.Tensor | None = None
    """A score of each head to which attention goes without a value (gpt-oss) [heads]."""


@dataclass(frozen=True)
class _Bucket:
    """Spans of about the same length, padded: indices of tokens in the packed batch."""

    queries: torch.Tensor
    """[spans, longest span]"""
    keys: torch.Tensor
    """[spans, longest span with its prefix]"""
    query_positions: torch.Tensor
    """[spans, 1, queries, 1], from the first token of the span's prefix."""
    key_positions: torch.Tensor
    """[keys]; those of padding come after a span's last query."""
    has_prefix: bool
    """Whether a span sees keys before it."""
    masks: dict[tuple[int | None, torch.dtype], torch.Tensor] = field(
        default_factory=dict
    )
    """The masks that layers have asked for, by their window and type."""

    def is_causal(self, window: int | None) -> bool:
        """Whether each query sees its span's tokens up to itself, and nothing else."""
        return not _needs_mask(self.has_prefix, self.queries.shape[1], window)

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Return 0 where a query attends to a key, else minus infinity [spans, 1, queries, keys].

        Of numbers and one for all layers, because PyTorch would turn one of booleans into another
        for each layer, and keep it for the backward pass: of long rows, most of the memory.

        Args:
            window: Tokens that a query sees, itself included; None: all before it.
            dtype: That of the queries.
        """
        if (window, dtype) not in self.masks:
            hidden = self.key_positions > self.query_positions
            if window is not None:
                hidden |= self.key_positions <= self.query_positions - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            self.masks[window, dtype] = mask.masked_fill_(hidden, -torch.inf)
        return self.masks[window, dtype]


@dataclass(frozen=True)
class Buckets:
    """The buckets of a packed batch."""

    buckets: list[_Bucket]
    output_indices: torch.Tensor
    """Where the output of each token is in the buckets' outputs, one after another [tokens]."""
    is_in_order: bool
    """Whether the only bucket has the batch's tokens as they are: spans of the same length."""


def make_buckets(spans: list[Span], tokens: int, device: torch.device) -> Buckets:
    """Sort a batch's spans into buckets.

    Args:
        spans: Of the packed batch, in order.
        tokens: Tokens of the packed batch.
        device: Where the tensors go.
    """
    output_indices = torch.empty(tokens, dtype=torch.long)
    buckets = []
    offset = 0
    for group in _group_by_length(spans):
        longest = group[0].length
        for number, span in enumerate(group):
            first_output = offset + number * longest
            indices = torch.arange(span.length) + first_output
            output_indices[span.start : span.stop] = indices
        buckets.append(_make_bucket(group, device))
        offset += len(group) * longest
    lengths = {span.length for span in spans}
    has_prefix = any(span.prefix_length for span in spans)
    return Buckets(
        buckets,
        output_indices.to(device),
        is_in_order=len(lengths) == 1 and not has_prefix,
    )


@dataclass(frozen=True)
class PaddedSizes:
    """Elements of a batch's buckets."""

    queries: int
    """Padded tokens."""
    keys: int
    """The same with the shared prefix of each span."""
    scores: int
    """Of one head."""
    masks: int
    """As many as scores, in the buckets that have a mask."""


def padded_sizes(spans: list[Span], window: int | None) -> PaddedSizes:
    """Count the elements of a batch's buckets.

    Args:
        spans: Of the packed batch, in order.
        window: Tokens that a query sees in the layer with the smallest window; 0: all buckets have
            a mask; None: no layer has a window.
    """
    queries = 0
    keys = 0
    scores = 0
    masks = 0
    for group in _group_by_length(spans):
        query_count = group[0].length
        key_count = max(span.prefix_length + span.length for span in group)
        queries += len(group) * query_count
        keys += len(group) * key_count
        scores += len(group) * query_count * key_count
        has_prefix = any(span.prefix_length for span in group)
        if _needs_mask(has_prefix, query_count, window):
            masks += len(group) * query_count * key_count
    return PaddedSizes(queries, keys, scores, masks)


def _needs_mask(has_prefix: bool, longest: int, window: int | None) -> bool:
    """Whether a query of a bucket sees more, or less, than its span's tokens up to itself.

    Args:
        has_prefix: Whether a span of the bucket sees keys before it.
        longest: Tokens of the longest span.
        window: Tokens that a query sees, itself included; None: all before it.
    """
    return has_prefix or (window is not None and window < longest)


def _group_by_length(spans: list[Span]) -> list[list[Span]]:
    """Group spans, the longest first, so that little of a group is padding."""
    groups: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: -span.length):
        limit = MAX_LENGTH_RATIO * span.length + 16
        if groups and groups[-1][0].length <= limit:
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
        # Shorter spans fill the front of their row only.
        key_indices = span.key_indices()
        queries[number, : span.length] = torch.arange(span.start, span.stop)
        keys[number, : len(key_indices)] = key_indices
    # A query comes after its whole prefix; keys are counted from the prefix's first token. The
    # keys' padding comes after the span's last query, so the causal mask hides it as well.
    prefix_lengths = torch.tensor([span.prefix_length for span in spans])
    first_positions = prefix_lengths[:, None, None]
    query_positions = first_positions + torch.arange(query_count)[:, None]
    return _Bucket(
        queries=queries.to(device),
        keys=keys.to(device),
        # One mask for all heads.
        query_positions=query_positions[:, None].to(device),
        key_positions=torch.arange(key_count, device=device),
        has_prefix=any(span.prefix_length for span in spans),
    )


def attend_padded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    buckets: Buckets,
    scores: Scores,
) -> torch.Tensor:
    """Compute the attention of every span. See `PackedAttention.attend`.

    Args:
        query: [tokens, heads, head_dim].
        key: [tokens, key/value heads, head_dim].
        value: [tokens, key/value heads, value_dim].
        buckets: From `make_buckets`.
        scores: What is peculiar to the layer.

    Returns:
        [tokens, heads, value_dim].
    """
    tokens, heads, _ = query.shape
    outputs = []
    for bucket in buckets.buckets:
        gather = _view_in_order if buckets.is_in_order else _gather
        output = _attend(
            gather(query, bucket.queries),
            _repeat_heads(gather(key, bucket.keys), heads),
            _repeat_heads(gather(value, bucket.keys), heads),
            bucket,
            scores,
        )
        outputs.append(_join_heads(output))
    # `torch.cat` would copy a single output.
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if not buckets.is_in_order:
        # Leaves out the outputs of padding.
        output = embedding(buckets.output_indices, output)
    return output.view(tokens, heads, -1)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bucket: _Bucket,
    scores: Scores,
) -> torch.Tensor:
    """Compute the attention of a bucket.

    Args:
        query: [spans, heads, queries, head_dim].
        key: [spans, heads, keys, head_dim].
        value: [spans, heads, keys, value_dim].
        bucket: The bucket.
        scores: What is peculiar to the layer.

    Returns:
        [spans, heads, queries, value_dim].
    """
    if scores.softcap is None and scores.sinks is None:
        # Without a mask PyTorch leaves out the keys behind a block of queries.
        is_causal = bucket.is_causal(scores.window)
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if is_causal else bucket.mask(scores.window, query.dtype),
            is_causal=is_causal,
            scale=scores.scale,
        )
    scale = query.shape[-1] ** -0.5 if scores.scale is None else scores.scale
    logits = query @ key.transpose(-2, -1) * scale
    if scores.softcap is not None:
        logits = torch.tanh(logits / scores.softcap) * scores.softcap
    logits = logits + bucket.mask(scores.window, query.dtype)
    if scores.sinks is not None:
        sinks = scores.sinks.view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sinks.to(logits.dtype)], -1)
    weights = torch.softmax(logits, -1, dtype=torch.float32).to(query.dtype)
    if scores.sinks is not None:
        # What goes to the sink has no value.
        weights = weights[..., :-1]
    return weights @ value


def smallest_window(decoder: Any) -> int | None:
    """Return the smallest window of a decoder's layers, as `padded_sizes` takes it."""
    if stored_scores(decoder):
        return 0
    windows = [getattr(part, "sliding_window", None) for part in decoder.modules()]
    return min((window for window in windows if window), default=None)


def stored_scores(decoder: Any) -> int:
    """Return how many tensors of the scores' size `_attend` keeps for the backward pass."""
    if getattr(decoder.config, "attn_logit_softcapping", None) is not None:
        # The tanh of the scores, and the weights.
        return 2
    has_sinks = any(name.endswith("sinks") for name, _ in decoder.named_parameters())
    return 1 if has_sinks else 0


def _gather(states: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Gather a bucket's tokens: [tokens, heads, head_dim] to [spans, heads, length, head_dim].

    The gradient of `embedding` sums over the rows that share a prefix.
    """
    padded = embedding(indices, states.flatten(1))
    return padded.view(*indices.shape, *states.shape[1:]).transpose(1, 2)


def _view_in_order(states: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Do what `_gather` does with the indices of all tokens in order, without a copy."""
    return states.view(*indices.shape, *states.shape[1:]).transpose(1, 2)


def _join_heads(output: torch.Tensor) -> torch.Tensor:
    """Turn [spans, heads, length, head_dim] into [spans · length, heads · head_dim]."""
    tokens_first = output.transpose(1, 2)
    return tokens_first.flatten(2).flatten(0, 1)


def _repeat_heads(states: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeat key/value heads for grouped-query attention [spans, heads, length, head_dim]."""
    key_heads = states.shape[1]
    if key_heads == heads:
        return states
    return states.repeat_interleave(heads // key_heads, dim=1)
