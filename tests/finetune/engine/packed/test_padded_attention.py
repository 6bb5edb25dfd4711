"""Attention of padded spans: each query sees its prefix and its span up to itself, and no more."""

from typing import Any

import pytest
import torch

from finetune.engine.packed.batch import Span
from finetune.engine.packed.padded_attention import (
    Scores,
    attend_padded,
    make_buckets,
)

HEADS, KEY_HEADS, HEAD_DIM = 4, 2, 8

LAYOUTS = {
    "one span": [(7, None)],
    "equal spans": [(7, None), (7, None), (7, None)],
    "similar spans": [(5, None), (9, None), (7, None)],
    "equal spans in two buckets": [(3, None), (40, None), (3, None), (40, None)],
    "a shared prefix": [(4, None), (6, 0), (6, 0), (5, None)],
    "spans as long as their prefix": [(6, None), (6, 0), (6, 0)],
    "one token each": [(1, None), (1, None)],
}
"""For each span its length, and the number of the span that is its prefix."""


def make_spans(layout: list[tuple[int, int | None]]) -> list[Span]:
    spans: list[Span] = []
    start = 0
    for length, prefix in layout:
        first = start if prefix is None else spans[prefix].start
        prefix_length = 0 if prefix is None else spans[prefix].length
        spans.append(Span(start, length, first, prefix_length))
        start += length
    return spans


def is_prefix(span: Span, other: Span) -> bool:
    """Whether a span is the prefix of another one."""
    return other.prefix_length > 0 and other.prefix_start == span.start


def make_states(tokens: int) -> list[torch.Tensor]:
    """Query, key and value, whose heads come before their tokens in memory."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(heads, tokens, HEAD_DIM, generator=generator)
        .transpose(0, 1)
        .requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def attend_by_span(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: list[Span],
    scores: Scores,
) -> torch.Tensor:
    """Compute the same, one span and one operation at a time."""
    outputs = []
    for span in spans:
        indices = span.key_indices()
        q = query[span.start : span.stop].transpose(0, 1)
        k, v = (
            states[indices].transpose(0, 1).repeat_interleave(HEADS // KEY_HEADS, 0)
            for states in (key, value)
        )
        distance = (
            torch.arange(span.length)[:, None]
            + span.prefix_length
            - torch.arange(len(indices))
        )
        hidden = distance < 0
        if scores.window is not None:
            hidden |= distance >= scores.window
        logits = q @ k.transpose(1, 2) * HEAD_DIM**-0.5
        if scores.softcap is not None:
            logits = torch.tanh(logits / scores.softcap) * scores.softcap
        weights = torch.softmax(logits.masked_fill(hidden, -torch.inf), -1)
        outputs.append((weights @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 6, 7, 100])
@pytest.mark.parametrize("name", LAYOUTS)
def test_it_is_that_of_each_span(
    name: str, window: int | None, softcap: float | None
) -> None:
    spans = make_spans(LAYOUTS[name])
    tokens = spans[-1].stop
    states = make_states(tokens)
    scores = Scores(window=window, softcap=softcap)
    buckets = make_buckets(spans, tokens, torch.device("cpu"))
    output = attend_padded(states[0], states[1], states[2], buckets, scores)
    expected = attend_by_span(states[0], states[1], states[2], spans, scores)
    torch.testing.assert_close(output, expected)
    slope = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(output, states, slope)
    for gradient, theirs in zip(
        gradients, torch.autograd.grad(expected, states, slope), strict=True
    ):
        torch.testing.assert_close(gradient, theirs)


@pytest.mark.parametrize("name", LAYOUTS)
def test_nothing_is_copied_where_all_tokens_are_in_order(
    name: str, monkeypatch: Any
) -> None:
    from finetune.engine.packed import padded_attention

    def refuse(*_: Any) -> torch.Tensor:
        raise AssertionError("copied")

    spans = make_spans(LAYOUTS[name])
    tokens = spans[-1].stop
    buckets = make_buckets(spans, tokens, torch.device("cpu"))
    in_order = ("one span", "equal spans", "one token each")
    assert buckets.is_in_order == (name in in_order)
    if buckets.is_in_order:
        monkeypatch.setattr(padded_attention, "embedding", refuse)
    query, key, value = make_states(tokens)
    attend_padded(query, key, value, buckets, Scores())
    # Nor is there a mask.
    assert [bool(bucket.masks) for bucket in buckets.buckets] == [
        bucket.has_prefix for bucket in buckets.buckets
    ]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_span_never_reaches_one_that_does_not_see_it(name: str) -> None:
    spans = make_spans(LAYOUTS[name])
    tokens = spans[-1].stop
    buckets = make_buckets(spans, tokens, torch.device("cpu"))
    for broken in spans:
        states = [each.detach() for each in make_states(tokens)]
        for each in states:
            each[broken.start : broken.stop] = torch.nan
            each.requires_grad_()
        output = attend_padded(states[0], states[1], states[2], buckets, Scores())
        gradients = torch.autograd.grad(output, states, torch.ones_like(output))
        for span in spans:
            sees_it = span is broken or is_prefix(broken, span)
            is_nan = output[span.start : span.stop].isnan()
            assert is_nan.all() if sees_it else not is_nan.any()
            # What comes back to a prefix is of all who see it.
            if not sees_it and not is_prefix(span, broken):
                for gradient in gradients:
                    assert not gradient[span.start : span.stop].isnan().any()
