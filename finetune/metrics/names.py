"""What the names of metrics mean, for every place that shows them."""

from collections.abc import Iterable

OF_TOKENS = "of answer tokens, given the right beginning"
"""What the metric `accuracy` is a share of."""


def describe_metric(name: str) -> str:
    """Return a metric's name, and what it is a share of where the name would mislead.

    Args:
        name: As `accuracy`, `eval/accuracy`, `eval/SOURCE/accuracy`.
    """
    return f"{name} ({OF_TOKENS})" if _is_accuracy(name) else name


def format_metric(value: float) -> str:
    """Format a metric's value; whole numbers, as a count of weights, have no decimals."""
    is_count = abs(value) >= 100 and float(value).is_integer()
    return f"{value:.0f}" if is_count else f"{value:.4f}"


def metric_notes(names: Iterable[str]) -> list[str]:
    """Return a line below a table on each of its metrics whose name would mislead."""
    return [f"{name}: {OF_TOKENS}" for name in names if _is_accuracy(name)]


def _is_accuracy(name: str) -> bool:
    return name.rpartition("/")[2] == "accuracy"
