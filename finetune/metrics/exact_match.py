"""Exact match: whether an answer equals the row's, but for white space around it."""

from collections.abc import Sequence

from finetune.data.types import Row
from finetune.metrics.metric import Metric


def _score(
    predictions: Sequence[str], references: Sequence[str], rows: Sequence[Row]
) -> list[float]:
    pairs = zip(predictions, references, strict=True)
    return [float(prediction.strip() == answer.strip()) for prediction, answer in pairs]


METRIC = Metric("exact_match", ("exact_match",), _score)
