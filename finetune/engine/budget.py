"""How far a run is by its steps, tokens and minutes (`trainer.max_tokens`, `trainer.max_minutes`).

A run ends after the first optimizer step at which it has no step, no token or no minute left. Its
progress is the largest of the three shares; the learning rate's schedule follows it.
"""

from finetune.config.sections.trainer import TrainerSettings
from finetune.engine.checkpoint import Progress


class Budget:
    """Steps, tokens and minutes of a run."""

    def __init__(
        self, trainer: TrainerSettings, total: int, unlimited: int | None = None
    ) -> None:
        """Read the limits.

        Args:
            trainer: Has the limits of tokens and minutes.
            total: Optimizer steps of the whole run, as `total_steps` counts them.
            unlimited: As many as there would be without a limit of tokens; None: `total`.
        """
        self._total = total
        self._steps = unlimited or total
        self._tokens = trainer.max_tokens
        minutes = trainer.max_minutes
        self._seconds = None if minutes is None else 60 * minutes
        self.is_timed = minutes is not None
        """Whether the run may end before its last step."""
        self.counts_steps = self._tokens is None and self._seconds is None
        """Whether `position` is the number of steps taken, whatever their tokens and seconds."""

    def is_spent(self, progress: Progress) -> bool:
        """Return whether a run has no step or no minute left."""
        is_over = self._seconds is not None and progress.train_seconds >= self._seconds
        return is_over or progress.step >= self._total

    def position(self, progress: Progress) -> float:
        """Return how far a run is, in steps of the whole run: its progress times all steps."""
        if self.counts_steps:
            return progress.step
        shares = [progress.step / self._steps]
        if self._tokens is not None:
            shares.append(progress.train_tokens / self._tokens)
        if self._seconds is not None:
            shares.append(progress.train_seconds / self._seconds)
        return min(max(shares), 1.0) * self._total
