"""Metrics of classification: the most likely label of each row against the row's label."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.data.types import Row
from finetune.metrics.metric import Metric

UNSCORED = ""
"""In place of the prediction of a row that is not scored. No label is empty."""

TABLE_LABELS = 8
"""Most labels that a table on a terminal has."""

LABEL_WIDTH = 16
"""Characters of a label in a table."""

FREQUENT_CONFUSIONS = 5
"""Confusions that are listed in place of a table."""


@dataclass(frozen=True)
class Classification:
    """The label of each row, and the one that a model finds most likely."""

    labels: tuple[str, ...]
    references: tuple[int, ...]
    """The label of each answer, by its number in `labels`."""
    predictions: tuple[int | None, ...]
    """The most likely label of each answer; None: the row is not scored."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Classification":
        """Read a classification as `dataclasses.asdict` has written it."""
        return cls(
            tuple(values["labels"]),
            tuple(values["references"]),
            tuple(values["predictions"]),
        )

    def confusion(self) -> list[list[int]]:
        """Count the answers by label and by prediction [label][prediction]."""
        counts = Counter(zip(self.references, self.predictions, strict=True))
        numbers = range(len(self.labels))
        return [
            [counts[label, prediction] for prediction in numbers] for label in numbers
        ]


def confusion_lines(classification: Classification) -> list[str]:
    """Describe how often each label was taken for which, as lines for a terminal.

    A table; of more labels than it has room for, the most frequent confusions.
    """
    labels = classification.labels
    confusion = classification.confusion()
    if len(labels) > TABLE_LABELS:
        return _frequent_confusions(labels, confusion)
    names = [shorten(label) for label in labels]
    first = max(map(len, [*names, "label"]))
    widths = [max(len(name), 5) for name in names]
    lines = ["rows by their label (lines) and the most likely label (columns)"]
    lines.append(_table_line("", first, names, widths))
    for name, counts in zip(names, confusion, strict=True):
        lines.append(_table_line(name, first, list(map(str, counts)), widths))
    return lines


def _table_line(
    name: str, name_width: int, cells: Sequence[str], widths: Sequence[int]
) -> str:
    columns = zip(cells, widths, strict=True)
    line = "  ".join(f"{cell:>{width}}" for cell, width in columns)
    return f"{name:{name_width}}  {line}"


def _frequent_confusions(
    labels: Sequence[str], confusion: Sequence[Sequence[int]]
) -> list[str]:
    errors = [
        (count, label, prediction)
        for label, counts in enumerate(confusion)
        for prediction, count in enumerate(counts)
        if count and prediction != label
    ]
    errors.sort(key=lambda error: (-error[0], *error[1:]))
    lines = [f"{len(labels)} labels; the most frequent confusions:"]
    for count, label, prediction in errors[:FREQUENT_CONFUSIONS]:
        lines.append(f"{count} rows of {labels[label]} as {labels[prediction]}")
    return lines


def shorten(label: str) -> str:
    """Return a label on one line, cut to the width of a column."""
    line = " ".join(label.split())
    return line if len(line) <= LABEL_WIDTH else f"{line[: LABEL_WIDTH - 1]}…"


def _score(
    predictions: Sequence[str], references: Sequence[str], rows: Sequence[Row]
) -> dict[str, Any]:
    correct: list[float | None] = []
    pairs: Counter[tuple[str, str]] = Counter()
    for prediction, reference in zip(predictions, references, strict=True):
        if prediction == UNSCORED:
            correct.append(None)
            continue
        correct.append(float(prediction == reference))
        pairs[reference, prediction] += 1
    if not pairs:
        return dict.fromkeys(METRIC.names, correct)
    return {
        "label_accuracy": correct,
        "balanced_accuracy": _balanced_accuracy(pairs),
        "macro_f1": _macro_f1(pairs),
    }


def _balanced_accuracy(pairs: Counter[tuple[str, str]]) -> float:
    """The mean, over the rows' labels, of the share of a label's rows that are right."""
    row_counts: Counter[str] = Counter()
    for (reference, _), count in pairs.items():
        row_counts[reference] += count
    recalls = [pairs[label, label] / count for label, count in row_counts.items()]
    return sum(recalls) / len(recalls)


def _macro_f1(pairs: Counter[tuple[str, str]]) -> float:
    """The mean of the labels' F1, over all labels that a row or a prediction has."""
    # Rows and predictions of a label together: F1 is 2 · right / (rows + predictions).
    counts: Counter[str] = Counter()
    for (reference, prediction), count in pairs.items():
        counts[reference] += count
        counts[prediction] += count
    scores = [2 * pairs[label, label] / count for label, count in counts.items()]
    return sum(scores) / len(scores)


METRIC = Metric(
    "classification",
    ("label_accuracy", "balanced_accuracy", "macro_f1"),
    _score,
    is_generated=False,
)
