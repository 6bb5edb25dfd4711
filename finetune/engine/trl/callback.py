"""The trainer callback by which TRL's steps and checkpoints reach the reporter."""

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from finetune.engine.budget import Budget
from finetune.engine.reporter import Reporter
from finetune.engine.steps import drive


class ReporterCallback(TrainerCallback):  # type: ignore[misc]
    """Passes each step's figures to the reporter, and lets it complete each checkpoint."""

    def __init__(
        self,
        reporter: Reporter,
        checkpoint_limit: int | None,
        budget: Budget | None = None,
    ) -> None:
        """Report a run's steps.

        Args:
            reporter: The run's reporter.
            checkpoint_limit: Number of checkpoints that stay; None: all.
            budget: What the learning rate follows; None: the steps alone.
        """
        self._reporter = reporter
        self._checkpoint_limit = checkpoint_limit
        self._budget = budget
        self._learning_rate: float | None = None
        """Of the current step, where it follows the budget."""
        self._total_tokens = 0.0
        self._training_since = time.perf_counter()
        """Evaluations and checkpoints move it forward, so that they don't count as training."""

    def on_train_begin(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Start the clock."""
        self._training_since = time.perf_counter()

    def on_step_begin(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        """Set the learning rate of a step by the budget; the trainer has set it by the steps."""
        if self._budget is None:
            return
        position = self._budget.position(self._reporter.progress)
        factor = lr_scheduler.lr_lambdas[0](position)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self._learning_rate = optimizer.param_groups[0]["lr"]

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Report a step: `logging_steps=1`, so that the trainer logs each one."""
        # The summary at the end of training has no `loss`.
        if logs is None or "loss" not in logs:
            return
        seconds = time.perf_counter() - self._training_since
        # TRL counts the tokens of all steps so far.
        total_tokens = logs["num_tokens"]
        tokens = total_tokens - self._total_tokens
        self._total_tokens = total_tokens
        rate = self._learning_rate
        if rate is None:
            rate = logs["learning_rate"]
        steps = self._reporter.report_step(
            step=state.global_step,
            loss=logs["loss"],
            grad_norm=logs.get("grad_norm"),
            learning_rate=rate,
            tokens=int(tokens),
            seconds=seconds,
        )
        # The trainer's loop calls back and can't yield the run's requests itself.
        drive(steps)
        self._training_since = time.perf_counter()
        stop = self._reporter.progress.stop
        if stop is not None:
            control.should_training_stop = True
            # An interrupted run is resumed; a pruned or finished one is not.
            control.should_save = stop == "interrupted"
        elif self._reporter.is_checkpoint_due:
            control.should_save = True

    def on_save(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Complete the checkpoint that the trainer has written."""
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self._reporter.complete_checkpoint(checkpoint, self._checkpoint_limit)
        self._training_since = time.perf_counter()
