"""Constraints on the results of trials: `adapter/parameters <= 2e6`."""

import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.config.sections.evaluation import BITS_PER_BYTE
from finetune.errors import did_you_mean, refusal

KEY = "hydra.sweeper.constraints"

FIGURES = (
    "train_tokens",
    "train_seconds",
    "tokens_per_second",
    "peak_memory_bytes",
    "effective_batch_size",
    "learning_rate",
    "step",
)
"""Entries of `result.json` that are numbers, besides the metrics."""

_CONSTRAINT = re.compile(r"\s*([^\s<>=]+)\s*(<=|>=|<|>)\s*(\S+)\s*")


@dataclass(frozen=True)
class Constraint:
    """A bound of one figure of a trial's result."""

    text: str
    """As the user wrote it."""
    name: str
    """A metric, or one of `FIGURES`."""
    is_upper: bool
    bound: float
    """The last value that is allowed."""

    def violation(self, value: float) -> float:
        """Return how far a value is beyond the bound; 0 or less: the constraint is met."""
        if math.isnan(value):
            return sys.float_info.max
        distance = value - self.bound if self.is_upper else self.bound - value
        return max(-sys.float_info.max, min(distance, sys.float_info.max))


def parse_constraint(text: str) -> Constraint:
    """Read a constraint, `NAME <= NUMBER`, or with >=, < or >.

    Raises:
        ConfigError: it has another form.
    """
    match = _CONSTRAINT.fullmatch(text)
    number = math.nan
    if match is not None:
        try:
            number = float(match[3])
        except ValueError:
            match = None
    if match is None or not math.isfinite(number):
        raise refusal(KEY, text, "must be NAME <= NUMBER, or with >=, < or >")
    operator = match[2]
    is_upper = operator.startswith("<")
    if operator in ("<", ">"):
        # The number itself is not allowed: its neighbour is the last one that is.
        number = math.nextafter(number, -math.inf if is_upper else math.inf)
    return Constraint(text.strip(), match[1], is_upper, number)


def require_names(constraints: Iterable[Constraint], metrics: Iterable[str]) -> None:
    """Refuse constraints on what no result has.

    Args:
        constraints: the constraints.
        metrics: the names of the metrics that a run has.

    Raises:
        ConfigError: names the first of them.
    """
    allowed = [*metrics, *FIGURES]
    for constraint in constraints:
        if constraint.name not in allowed:
            raise refusal(KEY, constraint.text, did_you_mean(constraint.name, allowed))


def require_computed(
    constraints: Iterable[Constraint], objectives: Iterable[str]
) -> None:
    """Refuse constraints on a metric that runs compute only where it is an objective.

    Args:
        constraints: the constraints.
        objectives: the study's objectives.

    Raises:
        ConfigError: names the first of them.
    """
    name = f"eval/{BITS_PER_BYTE}"
    if name in objectives:
        return
    for constraint in constraints:
        if constraint.name == name:
            reason = f"is computed only where it is an objective: objective={name}"
            raise refusal(KEY, constraint.text, reason)


def violations(
    constraints: Iterable[Constraint], figures: Mapping[str, Any], is_final: bool
) -> dict[str, float]:
    """Return how far a trial is beyond each bound, by the constraint's text.

    Args:
        constraints: the constraints.
        figures: the figures of the trial that there are so far.
        is_final: whether there will be no more: what is missing then violates its constraint.
    """
    distances: dict[str, float] = {}
    for constraint in constraints:
        value = figures.get(constraint.name)
        if value is not None:
            distances[constraint.text] = constraint.violation(value)
        elif is_final:
            distances[constraint.text] = sys.float_info.max
    return distances
