"""Metrics of answers, beside the loss of held-out rows."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from finetune.config.sections.section import Section
from finetune.errors import did_you_mean, refusal

BUILT_IN = {
    "exact_match": ("exact_match",),
    "rouge": ("rouge1", "rouge2", "rougeL"),
    "json_valid": ("json_valid",),
    "tool_calls": ("tool_calls",),
    "classification": ("label_accuracy", "balanced_accuracy", "macro_f1"),
}
"""The built-in metrics, each with the names of its scores."""

HARNESS = "harness/"
"""The beginning of a metric's name that is a task of lm-evaluation-harness."""

LOSS_METRICS = ("loss", "accuracy")
"""What every evaluation has, without generated answers."""

BITS_PER_BYTE = "bits_per_byte"
"""The loss by the bytes of the answers, which compares bases; computed as an objective only."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Section):
    """Metrics of answers, and how the answers are generated."""

    section = "evaluation"

    # The defaults are for run folders that were written before this section existed.
    metrics: list[str] = field(default_factory=list)
    """Metrics of generated answers: exact_match, rouge, json_valid, tool_calls, or the import path
    of a function, for example `my_module.score`; or classification, by the likelihood of each
    label, without generation; or harness/TASK, a task or a group of tasks of
    lm-evaluation-harness. Each is `eval/NAME` and `test/NAME`."""

    harness_path: str | None = None
    """A folder with tasks of your own for lm-evaluation-harness; null: its own tasks alone."""

    harness_chat_template: bool | Literal["auto"] = "auto"
    """Whether prompts of tasks are rendered by the base's chat template, the examples in them as
    turns; auto: if the base has one, as the run's rows are."""

    harness_system: str | None = None
    """Text of a system turn before each prompt of a task; null: only the task's description."""

    max_new_tokens: int = 128
    """Limit of a generated answer, in tokens."""

    temperature: float = 0.0
    """Answers are drawn with this temperature, by the same random numbers in each trial and at each
    evaluation; 0: each token is the most likely one."""

    top_p: float = 1.0
    """With a temperature: only the likeliest tokens that have this share together are drawn."""

    limit: int | None = None
    """The number of rows that get answers, the first ones of each part; null: all."""

    every: int = 1
    """Answers are generated at every n-th evaluation, the one before training included; 0: only at
    the last evaluation, which always has them."""

    turns: Literal["last", "all"] = "last"
    """Which answers of a chat are generated: the last one, or all, each after the chat's turns as
    the row has them."""

    max_labels: int = 50
    """Largest number of different answers that training rows may have for classification."""

    concurrency: int = 8
    """Number of calls of a judge at the same time."""

    retries: int = 2
    """Number of further calls of a judge after one that failed."""

    @property
    def generates(self) -> bool:
        """Whether a metric needs generated answers to rows."""
        return any(
            name != "classification" and not is_task(name) for name in self.metrics
        )

    def __post_init__(self) -> None:
        for name in self.metrics:
            is_named_task = is_task(name) and name != HARNESS
            if name not in BUILT_IN and not is_named_task and not is_import_path(name):
                allowed = (
                    f"{did_you_mean(name, BUILT_IN)}, harness/TASK, or the import path of a "
                    "function"
                )
                raise refusal("evaluation.metrics", name, allowed)
        for name, count in Counter(self.names).items():
            allowed = f"eval/{name} would have two meanings; rename the function"
            is_taken = name in (*LOSS_METRICS, BITS_PER_BYTE) or count > 1
            self.require("metrics", not is_taken, allowed)
        allowed = "must be a whole number of at least 1"
        self.require("max_new_tokens", self.max_new_tokens >= 1, allowed)
        self.require("max_labels", self.max_labels >= 2, "must be at least 2")
        self.require("concurrency", self.concurrency >= 1, allowed)
        has_rows = self.limit is None or self.limit >= 1
        self.require("limit", has_rows, f"{allowed}, or null: all rows")
        self.require("every", self.every >= 0, "must be at least 0 (0: only the last)")
        is_temperature = 0 <= self.temperature < math.inf
        allowed = "must be a number of at least 0 (0: the most likely tokens)"
        self.require("temperature", is_temperature, allowed)
        is_share = 0 < self.top_p <= 1
        self.require("top_p", is_share, "must be above 0 and at most 1")
        self.require("retries", self.retries >= 0, "must be at least 0")

    @property
    def names(self) -> list[str]:
        """Names of the scores, as far as they are known before a function is imported."""
        names: list[str] = []
        for name in self.metrics:
            if is_task(name):
                names.append(name)
            else:
                names += BUILT_IN.get(name, (name.rpartition(".")[2],))
        return names

    @property
    def has_functions(self) -> bool:
        """Whether any metric is a function of the user's."""
        return any(name not in BUILT_IN and not is_task(name) for name in self.metrics)

    @property
    def has_tasks(self) -> bool:
        """Whether any metric is a task of lm-evaluation-harness."""
        return any(map(is_task, self.metrics))


def is_task(name: str) -> bool:
    """Whether a metric, or a score of it, is of a task of lm-evaluation-harness."""
    return name.startswith(HARNESS)


def is_import_path(name: str) -> bool:
    """Whether a text could be the path of a function in a module."""
    parts = name.split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)
