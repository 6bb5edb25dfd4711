"""The checkpoint: a folder `checkpoints/checkpoint-<step>/` from which a killed run resumes.

Files of a checkpoint, by engine:

- packed: `slot.safetensors` holds the adapter's weights as one float32 vector [parameters], the
  state of the optimizer (of AdamW two more vectors and the step; of others the state of each
  parameter), and with float16 the loss scale.
- trl: what transformers' Trainer writes: `adapter_model.safetensors`, `optimizer.pt`,
  `scheduler.pt`, `rng_state.pth`, `trainer_state.json`.
- both: `progress.json`, this module's `Progress`. It is written last: a checkpoint without it was
  cut short by a kill, and is removed instead of resumed from.

`checkpoints/best-<step>/` is not a checkpoint but a plain adapter folder: the adapter of the best
evaluation so far, with `objective_at=best` (see `early_stopping`).
"""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune.files.atomic import read_json, write_json
from finetune.files.run_folder import PROGRESS, Metrics


@dataclass
class Progress:
    """A run's state between two optimizer steps, without weights and optimizer.

    The names of the fields are the keys of `progress.json`.
    """

    step: int = 0
    """Completed optimizer steps."""
    train_tokens: int = 0
    """Tokens trained so far, without padding."""
    train_seconds: float = 0.0
    """Seconds spent in optimizer steps, without evaluations and checkpoints."""
    train_loss: float = math.nan
    """`train/loss` as last logged, in nats per token; NaN before the first logged line."""
    window_losses: list[float] = field(default_factory=list)
    """Loss of each step since the last logged line, in nats per token."""
    window_tokens: int = 0
    """Tokens trained since the last logged line."""
    window_seconds: float = 0.0
    """Seconds of training since the last logged line."""
    silent_steps: int = 0
    """Number of steps, counted from the first, whose gradient was exactly zero."""
    rungs: list[dict[str, Any]] = field(default_factory=list)
    """Each evaluation so far, as the fields of a `Rung`."""
    best: float | None = None
    """The best objective of an evaluation so far."""
    best_step: int = 0
    """Optimizer step of the best evaluation."""
    rungs_without_better: int = 0
    """Evaluations since the best one."""
    stop: str | None = None
    """Why training ended before its last step: `pruned`, `early`, `minutes` or `interrupted`."""

    def add_step(
        self,
        step: int,
        loss: float,
        tokens: int,
        seconds: float,
    ) -> None:
        """Count a completed optimizer step.

        Args:
            step: The step's number, from 1.
            loss: Mean loss of the step, in nats per token.
            tokens: Tokens of the step's rows.
            seconds: Duration of the step.
        """
        self.step = step
        self.train_tokens += tokens
        self.train_seconds += seconds
        self.window_losses.append(loss)
        self.window_tokens += tokens
        self.window_seconds += seconds

    def window_metrics(self) -> Metrics:
        """Return the mean loss and the speed of the steps since the last logged line."""
        # Steps may be shorter than the clock's resolution.
        seconds = max(self.window_seconds, 1e-9)
        return {
            "train/loss": self._window_loss(),
            "train/tokens_per_second": self.window_tokens / seconds,
        }

    def _window_loss(self) -> float:
        return math.fsum(self.window_losses) / len(self.window_losses)

    def close_window(self, loss: float) -> None:
        """Begin a new window after a logged line with this `train/loss`."""
        self.train_loss = loss
        self.window_losses = []
        self.window_tokens = 0
        self.window_seconds = 0.0

    def final_metrics(self, best: bool) -> Metrics:
        """Return the metrics that the run ends with.

        Args:
            best: Take the held-out metrics of the best evaluation, not of the last.
        """
        loss = self.train_loss
        # A run that is stopped before its first logged line has no `train_loss` yet.
        if not math.isfinite(loss) and self.window_losses:
            loss = self._window_loss()
        metrics: Metrics = {"train/loss": loss, "train/seconds": self.train_seconds}
        rungs = self.rungs
        if best:
            rungs = [rung for rung in rungs if rung["step"] == self.best_step]
        if rungs:
            metrics |= rungs[-1]["metrics"]
        return metrics

    def save(self, checkpoint: Path) -> None:
        """Write `progress.json` into a checkpoint's folder."""
        write_json(checkpoint / PROGRESS, asdict(self))

    @classmethod
    def load(cls, checkpoint: Path) -> "Progress":
        """Read `progress.json` of a checkpoint. The reason for which the run stopped is cleared."""
        values = read_json(checkpoint / PROGRESS)
        values["stop"] = None
        # JSON has no NaN: it is written as null.
        if values["train_loss"] is None:
            values["train_loss"] = math.nan
        return cls(**values)
