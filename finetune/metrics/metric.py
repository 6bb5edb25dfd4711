"""A metric of answers, and its score: one number, with its parts by row."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.data.types import Message, Prompt, Row

ScoreFunction = Callable[[Sequence[str], Sequence[str], Sequence[Row]], Any]
"""Takes predictions, references and rows, each of the same length.

It returns one score for each row (None: the row is not scored), or one number for all rows, or a
mapping from names to either.
"""


@dataclass(frozen=True)
class Metric:
    """A metric of answers."""

    path: str
    """As `evaluation.metrics` names it."""
    names: tuple[str, ...]
    """Names of its scores; the first one is that of a result without names."""
    score: ScoreFunction
    higher_is_better: bool = True
    is_generated: bool = True
    """Whether its predictions are generated answers; otherwise they are the most likely labels."""
    task_metric: str | None = None
    """What a task of lm-evaluation-harness calls it; None: it scores answers to rows."""

    @property
    def reads_labels(self) -> bool:
        """Whether its predictions are the most likely labels of rows."""
        return not self.is_generated and self.task_metric is None


@dataclass(frozen=True)
class Answer:
    """An answer to be generated."""

    row: Row
    """The row that holds it."""
    position: int
    """The row's position among the evaluated rows, from 0."""
    prompt: Prompt
    message: Message
    """The answer as the row has it."""
    reference: str
    """Its text, with its tool calls and without think blocks."""


@dataclass(frozen=True)
class Score:
    """The value of a metric on a set of rows.

    Where it is a mean, each row has a sum and a count: the value is all sums over all counts. Of a
    loss the count is that of the row's tokens; of a score of answers that of the row's scored
    answers. A metric that is one number for all rows has neither, and so no interval.
    """

    value: float
    higher_is_better: bool
    row_sums: tuple[float, ...] = ()
    row_counts: tuple[int, ...] = ()

    @property
    def row_count(self) -> int:
        """Number of rows that have a value; 0 where the metric is one number for all rows."""
        return sum(count > 0 for count in self.row_counts)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Score":
        """Read a score as `dataclasses.asdict` has written it."""
        sums, counts = tuple(values["row_sums"]), tuple(values["row_counts"])
        return cls(values["value"], values["higher_is_better"], sums, counts)
