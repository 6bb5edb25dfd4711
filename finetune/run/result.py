"""The result of a run, as `result.json` holds it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune.config.schema import RunConfig
from finetune.data.rows import Rows
from finetune.engine.checkpoint import Progress
from finetune.files.environment import git_commit, versions
from finetune.files.run_folder import Metrics
from finetune.model.memory import peak_memory_bytes
from finetune.model.source import BaseSource
from finetune.run.context import RunContext
from finetune.version import SCHEMA_VERSION

Objective = float | tuple[float, ...] | None
"""What a run returns: its objective, one value for each of several objectives, or None without
held-out rows."""


def objective_of(config: RunConfig, metrics: Metrics) -> Objective:
    """Return the objective of a run from its final metrics.

    It is not a number where a run was stopped before answers were generated, or where no row was
    scored.
    """
    values = tuple(metrics.get(name, math.nan) for name in config.objectives)
    if not values:
        return None
    return values[0] if len(values) == 1 else values


@dataclass
class Result:
    """The result so far: a run records what it knows, and writes it however the run ends."""

    config: RunConfig
    context: RunContext
    status: str = "running"
    """running, completed, pruned, interrupted or failed."""
    metrics: Metrics = field(default_factory=dict)
    error: str | None = None
    """What ended a failed or interrupted run, in one line."""
    rows: Rows | None = None
    base: BaseSource | None = None
    quantization: str | None = None
    """nf4, fp4, int8, none, or the method that a base's files were quantised with (gptq, …)."""
    engine: str | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    """Rows without an answer's token within `dataset.max_length`, by part."""
    labels: Mapping[str, str] | None = None
    """The labels of the training rows, each with its text; None without classification."""
    progress: Progress | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `result.json`."""
        progress = self.progress or Progress()
        seconds = progress.train_seconds
        tokens = progress.train_tokens
        counts: dict[str, Any] | None = None
        if self.rows:
            counts = {**self.rows.counts, "left_out": self.left_out}
        return {
            "schema_version": SCHEMA_VERSION,
            "status": self.status,
            "objective": self._objectives(),
            "metrics": self.metrics,
            "error": self.error,
            "step": progress.step,
            "seed": self.config.seed,
            "engine": self.engine,
            "slots": self.context.slots,
            "companions": sorted(self.context.packed_with),
            "learning_rate": self.config.optimizer.learning_rate,
            "effective_batch_size": self.config.trainer.effective_batch_size,
            "train_tokens": tokens,
            "train_seconds": seconds,
            "tokens_per_second": tokens / seconds if seconds else None,
            # Not before training begins: to ask would import torch.
            "peak_memory_bytes": peak_memory_bytes() if self.progress else None,
            "versions": versions(),
            "git_commit": git_commit(),
            "base_model": self.base.identity if self.base else None,
            "quantization": self.quantization,
            "dataset_fingerprint": self.rows.fingerprint if self.rows else None,
            "rows": counts,
            "labels": self.labels,
        }

    def _objectives(self) -> object:
        """One objective as a mapping, several as a list of mappings, none as None."""
        objectives = [
            {"name": name, "value": self.metrics.get(name)}
            for name in self.config.objectives
        ]
        if len(objectives) == 1:
            return objectives[0]
        return objectives or None
