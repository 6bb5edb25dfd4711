"""Rows of several runs laid end to end: one line of tokens without padding, in which each row sees itself alone.

What the rows of one batch begin with alike (a system prompt) is laid once, and all of them attend to it.
"""

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch.nn.functional import embedding, scaled_dot_product_attention
from transformers import AttentionInterface

from finetune.data.encoding import IGNORED
from finetune.data.lengths import common_prefix_length, computed_length
from finetune.model.device import newer_gpu, to_device

Row = dict[str, list[int]]
"""A tokenised row: `input_ids` and `labels`."""


PADDED = 1.5
"""Rows whose attention is computed together differ in length by this factor at most."""


def packed_length(rows: Sequence[dict[str, Any]]) -> int:
    """How many tokens of a line a batch takes."""
    return sum(map(computed_length, rows)) - common_prefix_length(rows) * max(len(rows) - 1, 0)


@dataclass(frozen=True)
class Span:
    """A stretch of the line that sees itself, each token what is before it, and what its rows begin with."""

    start: int
    length: int
    beginning: int
    """Where in the line that beginning is."""
    shared: int
    """Its length; 0: none."""


@dataclass(frozen=True)
class _Bucket:
    """Spans of about the same length, whose attention is one call: indices into the line, padded."""

    queries: torch.Tensor
    """[spans, longest]"""
    keys: torch.Tensor
    """[spans, longest with its beginning]"""
    distance: torch.Tensor
    """[spans, 1, longest, longest with its beginning]: how far a key is behind a query; below 0: ahead of it."""

    @functools.cached_property
    def causal(self) -> torch.Tensor:
        """What each query may see."""
        return self.distance >= 0


class PackedBatch:
    """The tokens of some batches of rows, and where in them everything is."""

    def __init__(self, batches: Sequence[Sequence[Row]], device: torch.device) -> None:
        ids: list[int] = []
        positions: list[numpy.ndarray] = []
        predictors: list[numpy.ndarray] = []
        targets: list[numpy.ndarray] = []
        owners: list[numpy.ndarray] = []
        self.parts: list[tuple[int, int]] = []
        """Each batch's tokens: from, to."""
        self.answers: list[tuple[int, int]] = []
        """Each batch's predictions: from, to."""
        self.spans: list[Span] = []
        rows_before = answers = 0
        for rows in batches:
            begin, first = len(ids), answers
            shared = common_prefix_length(rows)
            if shared:
                self.spans.append(Span(begin, shared, begin, 0))
                ids += rows[0]["input_ids"][:shared]
                positions.append(numpy.arange(shared))
            for number, row in enumerate(rows, rows_before):
                start, own_ids = len(ids), row["input_ids"][: computed_length(row)]
                self.spans.append(Span(start, len(own_ids) - shared, begin, shared))
                ids += own_ids[shared:]
                positions.append(numpy.arange(shared, len(own_ids)))
                labels = numpy.array(row["labels"][shared + 1 :], dtype=numpy.int64)
                (own,) = numpy.nonzero(labels != IGNORED)
                predictors.append(own + start)
                targets.append(labels[own])
                owners.append(numpy.full(len(own), number))
                answers += len(own)
            rows_before += len(rows)
            self.parts.append((begin, len(ids)))
            self.answers.append((first, answers))

        arrays = [*map(numpy.concatenate, (targets, owners, predictors, positions)), numpy.array(ids)]
        together = to_device(torch.from_numpy(numpy.concatenate(arrays)), device)  # one copy for all
        self.targets, self.owners, self.predictors, places, tokens = torch.split(together, [*map(len, arrays)])
        """[answers' tokens] the tokens themselves, the number of each one's row, and where in the line the token
        before it is."""
        self.positions, self.ids = places[None], tokens[None]

    @functools.cached_property
    def _buckets(self) -> tuple[list[_Bucket], torch.Tensor]:
        """The spans by length, and where in their padded outputs, one after the other, each token of the line is."""
        spans = sorted(self.spans, key=lambda span: -span.length)
        groups: list[list[Span]] = []
        for span in spans:
            if groups and groups[-1][0].length <= PADDED * span.length + 16:
                groups[-1].append(span)
            else:
                groups.append([span])
        buckets, offset = [], 0
        places = torch.empty(self.ids.shape[1], dtype=torch.long)
        for group in groups:
            longest, widest = group[0].length, max(span.shared + span.length for span in group)
            # Padding stands for the span's own first token: another run's may be no number.
            queries = torch.tensor([[span.start] for span in group]).repeat(1, longest)
            keys = torch.tensor([[span.start] for span in group]).repeat(1, widest)
            for number, span in enumerate(group):
                own = torch.arange(span.start, span.start + span.length)
                queries[number, : span.length] = own
                keys[number, : span.shared] = torch.arange(span.beginning, span.beginning + span.shared)
                keys[number, span.shared : span.shared + span.length] = own
                places[own] = torch.arange(span.length) + offset + number * longest
            shared = torch.tensor([span.shared for span in group])[:, None, None]
            distance = torch.arange(longest)[:, None] + shared - torch.arange(widest)
            buckets.append(_Bucket(*(part.to(self.ids.device) for part in (queries, keys, distance[:, None]))))
            offset += len(group) * longest
        return buckets, places.to(self.ids.device)

    @functools.cached_property
    def _bounds(self) -> tuple[torch.Tensor, torch.Tensor, int, int, torch.Tensor | None]:
        """For a kernel with boundaries: of queries and of keys, the longest of each, which tokens the keys are."""
        lengths = torch.tensor([0] + [span.length for span in self.spans])
        widths = torch.tensor([0] + [span.length + span.shared for span in self.spans])
        keys = None
        if any(span.shared for span in self.spans):
            stretches = [
                torch.arange(start, start + length)
                for span in self.spans
                for start, length in ((span.beginning, span.shared), (span.start, span.length))
            ]
            keys = torch.cat(stretches).to(self.ids.device)
        of_queries, of_keys = (part.cumsum(0).to(self.ids.device, torch.int32) for part in (lengths, widths))
        return of_queries, of_keys, int(lengths.max()), int(widths.max()), keys

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, window: int | None
    ) -> torch.Tensor:
        """Attention of every span to itself and its beginning.

        Shapes: query [tokens, heads, width], key and value [tokens, groups, width]; returns the query's.
        """
        if query.dtype in (torch.bfloat16, torch.float16) and newer_gpu(query.device):
            return self._attend_within_bounds(query, key, value, scale, window)
        buckets, places = self._buckets
        flat = [part.reshape(len(part), -1) for part in (query, key, value)]
        outputs = []
        for bucket in buckets:
            indices = (bucket.queries, bucket.keys, bucket.keys)
            # the gradient of `embedding` sums what several rows make of the beginning they share
            padded = (embedding(index, part) for index, part in zip(indices, flat, strict=True))
            q, k, v = (part.view(*part.shape[:2], -1, query.shape[-1]).transpose(1, 2) for part in padded)
            seen = bucket.causal if window is None else bucket.causal & (bucket.distance < window)
            if k.shape[1] != q.shape[1]:
                k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
            found = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
            outputs.append(found.transpose(1, 2).flatten(2).flatten(0, 1))
        together = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return embedding(places, together).view(query.shape)

    def _attend_within_bounds(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, window: int | None
    ) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        of_queries, of_keys, longest, widest, keys = self._bounds
        if keys is not None:
            key, value = key[keys], value[keys]
        seen = (-1 if window is None else window - 1, 0)
        more: Any = (
            {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
        )  # torch 2.13
        found = varlen_attn(
            query, key, value, of_queries, of_keys, longest, widest, scale=scale, window_size=seen, **more
        )
        assert isinstance(found, torch.Tensor)  # not the pair that it returns when asked for more
        return found


ATTENTION = "line"
"""The name by which transformers' models find `_attention`."""


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    *,
    line: PackedBatch,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' models call it: [1, heads, tokens, width] in, [1, tokens, heads, width] out."""
    q, k, v = (part.squeeze(0).transpose(0, 1) for part in (query, key, value))
    return line.attend(q, k, v, scaling, sliding_window)[None], None


AttentionInterface.register(ATTENTION, _attention)
