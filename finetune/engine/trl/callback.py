"""The trainer callback by which TRL's steps and checkpoints reach the reporter."""

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from finetune.engine.reporter import Reporter
from finetune.engine.steps import drive


class ReporterCallback(TrainerCallback):  # type: ignore[misc]
    """Passes each step's figures to the reporter, and lets it complete each checkpoint."""

    def __init__(self, reporter: Reporter, checkpoint_limit: int | None) -> None:
        """Report a run's steps.

        Args:
            reporter: The run's reporter.
            checkpoint_limit: Number of checkpoints that stay; None: all.
        """
        self._reporter = reporter
        self._checkpoint_limit = checkpoint_limit
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
        steps = self._reporter.report_step(
            step=state.global_step,
            loss=logs["loss"],
            grad_norm=logs.get("grad_norm"),
            learning_rate=logs["learning_rate"],
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
