"""The metrics of a run, as a model card shows them: values, intervals over rows, counts of rows."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from finetune.files.atomic import read_json
from finetune.files.run_folder import RunFolder
from finetune.metrics.metric import Score
from finetune.metrics.names import describe_metric, format_metric
from finetune.metrics.row_interval import CONFIDENCE, row_interval, row_mean

SPLITS = {"test": "test", "eval": "held-out"}
"""What the beginnings of metrics' names stand for, in the order of the table."""


@dataclass(frozen=True)
class CardMetric:
    """A metric's line in the table of a card."""

    name: str
    """As `test/loss`."""
    label: str
    """The name, and what it is a share of."""
    value: float
    interval: tuple[float, float] | None
    """95 % confidence interval over rows; None: there are no values of rows, or too few."""
    rows: int | None

    @property
    def text(self) -> str:
        """The value as the table shows it."""
        return format_metric(self.value)

    @property
    def interval_text(self) -> str:
        """The interval as the table shows it."""
        if self.interval is None:
            return "none"
        low, high = self.interval
        return f"{low:.4f} to {high:.4f}"


def card_metrics(folder: RunFolder) -> list[CardMetric]:
    """Return the metrics of test rows, then those of held-out rows, of a run's `result.json`."""
    result = read_json(folder.result) or {}
    values: Mapping[str, Any] = result.get("metrics") or {}
    rows = result.get("rows") or {}
    scores = _test_scores(folder)
    metrics = []
    for split in SPLITS:
        for name, value in values.items():
            # JSON has null for a NaN.
            if not name.startswith(f"{split}/") or value is None:
                continue
            score = scores.get(name)
            interval = score_interval(score) if score else None
            count = len(score.row_counts) if score else None
            metrics.append(
                CardMetric(
                    name,
                    describe_metric(name),
                    value,
                    interval,
                    count or rows.get(split),
                )
            )
    return metrics


def _test_scores(folder: RunFolder) -> dict[str, Score]:
    """Return the scores of a run's test rows by the metrics' names, from `test_rows.json`."""
    record = read_json(folder.test_rows)
    # A NaN was written as null; an earlier version has no `row_correct`.
    if not record or None in record["row_losses"] or "row_correct" not in record:
        return {}
    counts = tuple(record["row_tokens"])
    total = max(sum(counts), 1)
    losses = tuple(record["row_losses"])
    correct = tuple(map(float, record["row_correct"]))
    scores = {
        "test/loss": Score(math.fsum(losses) / total, False, losses, counts),
        "test/accuracy": Score(sum(correct) / total, True, correct, counts),
    }
    for name, values in record.get("scores", {}).items():
        scores[f"test/{name}"] = Score.from_dict(values)
    return scores


def score_interval(score: Score) -> tuple[float, float] | None:
    """Compute the 95 % confidence interval of a metric over rows.

    Where each row is right or wrong, it is the exact one of a share (Clopper and Pearson, 1934),
    which holds for shares near 0 and 1 too.

    Returns:
        The lower and the upper end; None where the metric is one number for all rows, or where too
        few rows, or equal ones, say nothing of others.
    """
    sums = np.array(score.row_sums, dtype=float)
    counts = np.array(score.row_counts, dtype=float)
    if not counts.size or not row_mean(sums, counts).is_measurable:
        return None
    scored = counts > 0
    if (counts[scored] == 1).all() and np.isin(sums[scored], (0, 1)).all():
        right, rows = int(sums[scored].sum()), int(scored.sum())
        ends = stats.binomtest(right, rows).proportion_ci(CONFIDENCE, method="exact")
        return float(ends.low), float(ends.high)
    if row_mean(sums, counts).standard_error == 0:
        return None
    return row_interval(sums, counts)
