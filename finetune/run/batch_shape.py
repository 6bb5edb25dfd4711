"""The shape of a batch in memory: tokens, attention's padding and masks, predicted tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.data.encoding import IGNORED
from finetune.engine.packed.batch import packed_spans
from finetune.engine.packed.padded_attention import PaddedSizes, padded_sizes


@dataclass(frozen=True)
class BatchShape:
    """A batch as attention and the head see it."""

    tokens: int
    """Tokens that go through the layers, with padding where rows are padded."""
    attention: PaddedSizes
    """Elements of attention's padded tensors."""
    answers: int
    """Tokens that are predicted."""


def packed_shape(
    rows: Sequence[dict[str, Any]], shares_prefixes: bool, window: int | None
) -> BatchShape:
    """Return the shape of a batch without padding, but for attention's buckets.

    Args:
        rows: Those of the batch.
        shares_prefixes: Whether a prefix that all rows share is computed once.
        window: See `padded_sizes`.
    """
    spans = packed_spans(rows, shares_prefixes)
    tokens = sum(span.length for span in spans)
    return BatchShape(tokens, padded_sizes(spans, window), _answers(rows))


def padded_shape(rows: Sequence[dict[str, Any]]) -> BatchShape:
    """Return the shape of a batch that is padded to its longest row."""
    lengths = [len(row["input_ids"]) for row in rows] or [0]
    longest = max(lengths)
    tokens = len(rows) * longest
    scores = tokens * longest
    # Without padding transformers passes no mask.
    masks = 0 if min(lengths) == longest else scores
    return BatchShape(tokens, PaddedSizes(tokens, tokens, scores, masks), tokens)


def _answers(rows: Sequence[dict[str, Any]]) -> int:
    return sum(label != IGNORED for row in rows for label in row["labels"][1:])
