"""What both engines do after each optimizer step: log, evaluate, and decide whether to stop.

An engine calls `Reporter.report_step` with the step's figures, and ends when `progress.stop` is
set.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from finetune.config.schema import RunConfig
from finetune.engine.budget import Budget
from finetune.engine.checkpoint import Progress
from finetune.engine.early_stopping import EarlyStopping
from finetune.engine.interrupt import Interrupt
from finetune.engine.observer import Observer, Rung
from finetune.engine.output import RunOutput
from finetune.engine.schedule import (
    answer_steps,
    evaluation_rungs,
    share_rungs,
    warmup_steps,
)
from finetune.engine.steps import RunSteps
from finetune.errors import Diverged
from finetune.files.run_folder import Metrics, remove_old_checkpoints

STEPS_WITHOUT_GRADIENT = 3
"""A run fails if this many first steps have a gradient of exactly zero: nothing is trained.

Libraries can cause it without an error: bitsandbytes once took its path for inference on a CPU,
which has no autograd. A fresh adapter is no reason: its B is zero, but the gradient of B is not.
"""


class Reporter:
    """Receives each step's figures from an engine, and decides whether the run goes on."""

    def __init__(
        self,
        *,
        config: RunConfig,
        progress: Progress,
        total: int,
        output: RunOutput,
        evaluate: Callable[[bool], RunSteps[Metrics]] | None,
        early_stopping: EarlyStopping,
        observer: Observer,
        interrupt: Interrupt,
        constants: Metrics | None = None,
        on_checkpoint: Callable[[], None] = lambda: None,
    ) -> None:
        """Report on a run.

        Args:
            config: The run's config.
            progress: The run's state, updated at each step; `stop` ends the run.
            total: Optimizer steps of the whole run.
            output: Where metrics go.
            evaluate: Computes the metrics on held-out rows, and generates answers to them if its
                argument says so; None: there are no such rows.
            early_stopping: Records each evaluation, and may stop the run.
            observer: Receives each step and each evaluation, and may stop the run.
            interrupt: Ctrl-C and SIGTERM.
            constants: Final metrics that are known already.
            on_checkpoint: Called when a checkpoint is complete.
        """
        self.progress = progress
        self.total = total
        self._config = config
        self._output = output
        self._evaluate = evaluate
        self._early_stopping = early_stopping
        self._observer = observer
        self._interrupt = interrupt
        self._constants = constants or {}
        self._on_checkpoint = on_checkpoint
        self._rungs = evaluation_rungs(config.trainer.eval_steps, total)
        self._share_rungs = share_rungs(config.trainer.eval_steps, total)
        self._answer_steps = answer_steps(config.evaluation, self._rungs)
        self._budget = Budget(config.trainer, total)
        self._warmup_steps = warmup_steps(config.optimizer, total)
        self._last_checkpoint = time.monotonic()

    @contextmanager
    def live(self) -> Iterator[None]:
        """Within the block signals end training after the current step, and the bar is shown."""
        self._last_checkpoint = time.monotonic()
        with self._interrupt.handle_signals(), self._output.progress_bar():
            yield

    def begin(self) -> RunSteps[None]:
        """Evaluate before the first step. A resumed run has done so already."""
        self._output.advance(self.progress.step)
        if self.progress.step == 0:
            yield from self._evaluate_rung(0)
        elif self.is_complete:
            self._stop_by_minutes()

    @property
    def is_complete(self) -> bool:
        """Whether the run has taken its last step."""
        return self._budget.is_spent(self.progress)

    def _stop_by_minutes(self) -> None:
        """End a run that has no minute left; after the last step there is nothing to stop."""
        if self.progress.step < self.total:
            self.progress.stop = "minutes"

    def report_step(
        self,
        step: int,
        loss: float,
        grad_norm: float | None,
        learning_rate: float,
        tokens: int,
        seconds: float,
    ) -> RunSteps[None]:
        """Record an optimizer step; log, evaluate and set `progress.stop` where due.

        Args:
            step: The step's number, from 1.
            loss: Mean loss of the step, in nats per token.
            grad_norm: Norm of the gradient before clipping; None if the engine does not know it.
            learning_rate: Learning rate of the step.
            tokens: Tokens of the step's rows.
            seconds: Duration of the step.

        Raises:
            Diverged: The loss is not finite.
            RuntimeError: No gradient reaches the adapter.
        """
        self.progress.add_step(step, loss, tokens, seconds)
        # Before anything is logged: a diverged run ends here.
        self._check_loss(step, loss)
        self._check_gradient(step, grad_norm)
        self._output.advance()
        is_last = self.is_complete
        is_due = step % self._config.trainer.logging_steps == 0
        if is_due or is_last:
            self._log_window(step, learning_rate, grad_norm)
        rung = self._due_rung(step)
        if rung is not None:
            yield from self._evaluate_rung(rung)
        # After the last step there is nothing to stop: the run is complete.
        if is_last:
            self._stop_by_minutes()
        elif self.progress.stop is None:
            if self._interrupt.requested:
                self.progress.stop = "interrupted"
            elif self._observer.on_step(step):
                self.progress.stop = "pruned"

    def _due_rung(self, step: int) -> int | None:
        """Return the rung that is due after a step, by the step that it has in the schedule.

        A run that ends by the clock reaches rungs at a share of the run by its progress, those at a
        number of steps by its steps, and the last one when it ends.
        """
        if not self._budget.is_timed:
            return step if step in self._rungs else None
        if self.is_complete:
            return self.total
        position = self._budget.position(self.progress)
        shares = [rung for rung in self._share_rungs if rung <= position]
        counted = [rung for rung in self._rungs if rung <= step]
        counted = [rung for rung in counted if rung not in self._share_rungs]
        rung = max([*shares, *counted], key=self._rungs.__getitem__)
        last = self.progress.rungs[-1]["index"] if self.progress.rungs else 0
        return rung if self._rungs[rung] > last else None

    @property
    def is_checkpoint_due(self) -> bool:
        """Whether `trainer.save_minutes` have passed since the last checkpoint."""
        minutes = self._config.trainer.save_minutes
        if minutes is None:
            return False
        return time.monotonic() - self._last_checkpoint >= 60 * minutes

    def complete_checkpoint(self, checkpoint: Path, limit: int | None) -> None:
        """Complete a checkpoint that the engine has written, and remove outdated ones.

        Args:
            checkpoint: The checkpoint's folder, complete but for `progress.json`.
            limit: Number of checkpoints that stay; None: all.
        """
        self.progress.save(checkpoint)
        remove_old_checkpoints(checkpoint.parent, limit, self.progress.best_step)
        self._last_checkpoint = time.monotonic()
        self._on_checkpoint()

    def _check_loss(self, step: int, loss: float, name: str = "loss") -> None:
        # Only the loss: float16's loss scaling skips a step whose gradient overflows.
        if math.isfinite(loss):
            return
        rate = self._config.optimizer.resolved_learning_rate
        reason = f"training diverged at step {step} ({name} {loss}); lower it"
        raise Diverged(f"optimizer.learning_rate={rate}: {reason}")

    def _check_gradient(self, step: int, grad_norm: float | None) -> None:
        # Only the run's first steps in a row count.
        if grad_norm != 0 or self.progress.silent_steps != step - 1:
            return
        self.progress.silent_steps = step
        if step == STEPS_WITHOUT_GRADIENT:
            raise RuntimeError(
                "no gradient reaches the adapter: the first three steps had a gradient norm of 0"
            )

    def _log_window(
        self,
        step: int,
        learning_rate: float,
        grad_norm: float | None,
    ) -> None:
        """Log the steps since the last logged line."""
        window = self.progress.window_metrics()
        metrics = {
            "train/loss": window["train/loss"],
            "train/learning_rate": learning_rate,
            "train/tokens_per_second": window["train/tokens_per_second"],
        }
        if grad_norm is not None:
            metrics["train/grad_norm"] = grad_norm
        self.progress.close_window(metrics["train/loss"])
        self._output.log(step, metrics)
        self._output.show_training(step, metrics)

    def _evaluate_rung(self, rung_step: int) -> RunSteps[None]:
        """Evaluate, report to the observer, and stop the run if it or the patience says so.

        Args:
            rung_step: The step that the rung has in the schedule.
        """
        if self._evaluate is None:
            return
        step = self.progress.step
        began = time.perf_counter()
        has_answers = rung_step in self._answer_steps
        metrics = yield from self._evaluate(has_answers)
        seconds = time.perf_counter() - began
        names = self._config.objectives
        # Of several objectives none alone says which run is better.
        if len(names) == 1 and names[0] in metrics:
            metrics["objective"] = metrics[names[0]]
        loss = metrics["eval/loss"]
        rung = Rung(
            index=self._rungs[rung_step],
            step=step,
            # The clock may end it earlier.
            total=step if step and self.is_complete else self.total,
            metrics=metrics,
            constants=self._constants,
            is_warmup=self._budget.position(self.progress) < self._warmup_steps,
            train_tokens=self.progress.train_tokens,
            seconds=seconds,
            has_answers=has_answers,
        )
        self.progress.rungs.append(asdict(rung))
        # Logged before it is checked, so that the files show the loss that ended the run.
        self._output.log(step, metrics)
        self._output.show_evaluation(step, metrics)
        self._check_loss(step, loss, "held-out loss")
        self._early_stopping.record(step, metrics.get("objective"))
        self._observer.on_rung(rung)
        # Runs of one pack all report the rung before the pruner compares any of them there.
        yield None
        if self._observer.should_prune(rung):
            self.progress.stop = "pruned"
        elif not self.is_complete and self._early_stopping.should_stop(step):
            self.progress.stop = "early"
