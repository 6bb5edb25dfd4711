"""Early stopping: a run's best evaluation, its adapter, and the patience.

`trainer.early_stopping_patience=3` ends a run after three evaluations in a row without a better
objective; `objective_at=best` saves the adapter of the best evaluation and returns it at the end.
"""

from collections.abc import Callable

from finetune.config.schema import RunConfig
from finetune.engine.checkpoint import Progress


class EarlyStopping:
    """Tracks the best evaluation of a run, in the run's `Progress`."""

    def __init__(
        self,
        config: RunConfig,
        progress: Progress,
        total: int,
        save_best: Callable[[int], None],
        higher_is_better: bool,
    ) -> None:
        """Track the evaluations of a run.

        Args:
            config: The run's config.
            progress: The run's state; `best`, `best_step` and `rungs_without_better` are updated.
            total: Optimizer steps of the whole run.
            save_best: Saves the current adapter as the best one; receives the optimizer step.
                Called only with `objective_at=best`.
            higher_is_better: Whether the objective is better the larger it is.
        """
        self._progress = progress
        self._total = total
        self._save_best = save_best
        self._patience = config.trainer.early_stopping_patience
        self._saves_best = config.objective_at == "best"
        self._higher_is_better = higher_is_better

    def record(self, step: int, objective: float | None) -> None:
        """Compare an evaluation with the best so far.

        Args:
            step: Optimizer step of the evaluation.
            objective: Its objective; None if the run has several, or one that no evaluation gives.
        """
        if objective is None:
            return
        progress = self._progress
        # Equal is not better, so a run that stands still uses up its patience.
        if not self._is_better(objective):
            progress.rungs_without_better += 1
            return
        progress.best = objective
        progress.best_step = step
        progress.rungs_without_better = 0
        if self._saves_best:
            self._save_best(step)

    def should_stop(self, step: int) -> bool:
        """Return whether the patience is used up; after the last step there is nothing to stop."""
        if self._patience is None or step >= self._total:
            return False
        return self._progress.rungs_without_better >= self._patience

    def _is_better(self, objective: float) -> bool:
        best = self._progress.best
        if best is None:
            return True
        return objective > best if self._higher_is_better else objective < best
