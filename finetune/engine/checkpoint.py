"""The part of a checkpoint that is not weights: how far the run has come."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune.files.atomic import read_json, write_json
from finetune.files.run_folder import PROGRESS, Metrics


@dataclass
class Progress:
    """A run's state between steps beside weights and optimizer, saved with each checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    train_tokens: int = 0
    """Trained so far, padding not counted."""
    train_seconds: float = 0.0
    """Spent on them: evaluations and checkpoints not counted."""
    train_loss: float = math.nan
    """As last logged."""
    window_losses: list[float] = field(default_factory=list)
    """Of the steps since the last logged line."""
    window_tokens: int = 0
    window_seconds: float = 0.0
    silent_steps: int = 0
    """Steps from the start whose gradient was exactly zero."""
    rungs: list[dict[str, Any]] = field(default_factory=list)
    best: float | None = None
    best_step: int = 0
    rungs_without_better: int = 0
    stop: str | None = None
    """Why training ended before its last step: pruned, early, interrupted."""

    def final_metrics(self, best: bool) -> Metrics:
        """What the run ends with: its last evaluation, or its best."""
        window = self.window_losses  # of a run that was stopped before its first logged line
        loss = self.train_loss if math.isfinite(self.train_loss) or not window else math.fsum(window) / len(window)
        metrics: Metrics = {"train/loss": loss, "train/seconds": self.train_seconds}
        rungs = [rung for rung in self.rungs if not best or rung["step"] == self.best_step]
        return metrics | (rungs[-1]["metrics"] if rungs else {})

    def save(self, checkpoint: Path) -> None:
        """Keep the state in a checkpoint's folder."""
        write_json(checkpoint / PROGRESS, asdict(self))

    @classmethod
    def load(cls, checkpoint: Path) -> "Progress":
        """The state that a checkpoint keeps; what ended the run then does not end it now."""
        saved = read_json(checkpoint / PROGRESS)
        loss = saved["train_loss"]
        return cls(**saved | {"stop": None, "train_loss": math.nan if loss is None else loss})
