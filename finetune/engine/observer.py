"""The observer of a run: receives each step and each evaluation, and may stop the run."""

from dataclasses import dataclass, field

from finetune.files.run_folder import Metrics


@dataclass(frozen=True)
class Rung:
    """An evaluation: a point where a run reports its objective and may be stopped."""

    index: int
    """The rung's position as a multiple of the first rung's; 0: before the first step."""
    step: int
    """Optimizer step of the evaluation."""
    total: int
    """Optimizer steps of the whole run."""
    metrics: Metrics
    is_warmup: bool = False
    """Whether the learning rate is still rising at this step."""
    train_tokens: int = 0
    """Tokens that the run has trained so far, without padding."""
    seconds: float = 0.0
    """Duration of the evaluation; in a pack, that of its waits for the other runs included."""
    has_answers: bool = False
    """Whether it had metrics of answers or of tasks."""
    constants: Metrics = field(default_factory=dict)
    """Final metrics that do not change while the run trains: `adapter/parameters`."""


class Observer:
    """Base class: lets the run go on until its last step.

    In a pack, runs that began together have all reported a rung before any of them is judged there.
    """

    def on_step(self, step: int) -> bool:
        """Return whether to stop the run after this optimizer step, as pruned."""
        return False

    def on_rung(self, rung: Rung) -> None:
        """Receive an evaluation."""

    def should_prune(self, rung: Rung) -> bool:
        """Return whether to stop the run at this rung, as pruned. Called after `on_rung`."""
        return False

    def on_completed(self, metrics: Metrics) -> list[str]:
        """Return tags for the tracker's run. Called with the final metrics of a completed run."""
        return []
