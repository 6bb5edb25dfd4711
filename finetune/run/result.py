"""The result of a run, as `result.json` holds it."""

from dataclasses import dataclass, field
from typing import Any

from finetune.config.schema import RunConfig
from finetune.data.types import Rows
from finetune.engine.checkpoint import Progress
from finetune.files.environment import git_commit, versions
from finetune.files.run_folder import Metrics
from finetune.model.memory import peak_memory_bytes
from finetune.model.source import BaseSource
from finetune.run.context import RunContext

Objective = float | tuple[float, ...] | None
"""What a run is judged by: one value, one for each of several objectives, or None without held-out rows."""


@dataclass
class Result:
    """What `result.json` holds; filled in as the run goes on."""

    config: RunConfig
    part: RunContext
    engine: str | None = None
    status: str = "running"
    metrics: Metrics = field(default_factory=dict)
    error: str | None = None
    progress: Progress | None = None
    base: BaseSource | None = None
    rows: Rows | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    """Rows without an answer's token within `max_length`, by part."""

    def to_dict(self) -> dict[str, Any]:
        """As the file has it."""
        seconds = self.progress.train_seconds if self.progress else 0.0
        tokens = self.progress.train_tokens if self.progress else 0
        objectives = [{"name": name, "value": self.metrics.get(name)} for name in self.config.objectives]
        return {
            "status": self.status,
            "objective": objectives[0] if len(objectives) == 1 else objectives or None,
            "metrics": self.metrics,
            "error": self.error,
            "step": self.progress.step if self.progress else 0,
            "seed": self.config.seed,
            "engine": self.engine,
            "slots": self.part.slots,
            "companions": sorted(self.part.packed_with),
            "learning_rate": self.config.optimizer.learning_rate,
            "effective_batch_size": self.config.trainer.effective_batch_size,
            "train_tokens": tokens,
            "train_seconds": seconds,
            "tokens_per_second": tokens / seconds if seconds else None,
            "peak_memory_bytes": peak_memory_bytes() if self.progress else None,
            "versions": versions(),
            "git_commit": git_commit(),
            "base_model": self.base.identity if self.base else None,
            "dataset_fingerprint": self.rows.fingerprint if self.rows else None,
            "rows": {**self.rows.counts, "left_out": self.left_out} if self.rows else None,
        }
