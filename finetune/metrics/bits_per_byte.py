"""The loss in bits per byte of answer text, which is comparable between bases.

A loss in nats per token depends on how a base's tokenizer cuts the text; the bytes do not.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetune.data.encoding import IGNORED
from finetune.metrics.metric import Score

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 256
"""Rows whose answers are decoded at once."""


def bits_per_byte(
    row_losses: Sequence[float],
    rows: Sequence[Any],
    tokenizer: "PreTrainedTokenizerBase",
) -> Score:
    """Return the loss of tokenised rows by the bytes of their answers.

    The loss of special tokens, as the end of an answer, counts; they have no bytes.

    Args:
        row_losses: sum of the negative log-likelihoods of each row's answer tokens, in nats.
        rows: the rows, with `labels`.
        tokenizer: the base's tokenizer.
    """
    counts: list[int] = []
    for first in range(0, len(rows), BATCH):
        answers = []
        for number in range(first, min(first + BATCH, len(rows))):
            labels = rows[number]["labels"]
            answers.append([label for label in labels if label != IGNORED])
        for text in tokenizer.batch_decode(answers, skip_special_tokens=True):
            counts.append(len(text.encode()))
    bits = tuple(loss / math.log(2) for loss in row_losses)
    value = math.fsum(bits) / max(sum(counts), 1)
    return Score(value, False, bits, tuple(counts))
