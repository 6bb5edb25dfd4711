"""How many tokens of a row are computed, and how many a batch's rows share at their beginning."""

from collections.abc import Sequence
from typing import Any

from finetune.data.answers import common_length
from finetune.data.encoding import IGNORED

MIN_SHARED_TOKENS = 8
"""Shorter common prefixes are not computed apart from the rows: it would not pay."""


def common_prefix_length(rows: Sequence[dict[str, Any]]) -> int:
    """Return the number of tokens with which all rows begin and that the batch computes once.

    The prefix ends before the token that predicts the first answer's first token. It is 0 if it is
    shorter than `MIN_SHARED_TOKENS`, for a single row, and for sequences that hold several rows.

    Args:
        rows: Rows with `input_ids` and `labels`.
    """
    if len(rows) < 2 or "seq_lengths" in rows[0]:
        return 0
    sequences = [row["input_ids"] for row in rows]
    # What the first and the last in lexicographic order have in common, all have.
    first, last = min(sequences), max(sequences)
    equal = common_length(first, last)
    first_labels = min(first_label(row["labels"]) for row in rows)
    shared = min(equal, first_labels - 1, len(first) - 1)
    return shared if shared >= MIN_SHARED_TOKENS else 0


def computed_length(row: dict[str, Any]) -> int:
    """Return how many of a row's tokens are computed.

    The last one is the token that predicts the last token with a label; what follows it changes no
    loss.
    """
    labels = row["labels"]
    return next(
        (
            index
            for index in reversed(range(1, len(labels)))
            if labels[index] != IGNORED
        ),
        1,
    )


def first_label(labels: Sequence[int]) -> int:
    """Return the number of the first token with a label."""
    return next(index for index, label in enumerate(labels) if label != IGNORED)
