"""ROUGE: the F1 of words (rouge1), pairs of words (rouge2) and common subsequences (rougeL)."""

import importlib.util
from collections.abc import Sequence

from finetune.data.types import Row
from finetune.errors import refusal
from finetune.metrics.metric import Metric

NAMES = ("rouge1", "rouge2", "rougeL")


def require_rouge() -> None:
    """Raise ConfigError where the package `rouge-score` is not installed."""
    if importlib.util.find_spec("rouge_score") is None:
        reason = 'needs the package rouge-score: pip install "qlora-sweeps[rouge]"'
        raise refusal("evaluation.metrics", "rouge", reason)


def _score(
    predictions: Sequence[str], references: Sequence[str], rows: Sequence[Row]
) -> dict[str, list[float]]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(NAMES), use_stemmer=True)
    scores: dict[str, list[float]] = {name: [] for name in NAMES}
    for prediction, reference in zip(predictions, references, strict=True):
        of_row = scorer.score(reference, prediction)
        for name in NAMES:
            scores[name].append(of_row[name].fmeasure)
    return scores


METRIC = Metric("rouge", NAMES, _score)
