"""Logging, evaluation and stopping at each step: the same for both engines."""

import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from finetune.config.schema import RunConfig
from finetune.engine.checkpoint import Progress
from finetune.engine.interrupt import Interrupt
from finetune.engine.observer import Observer, Rung
from finetune.engine.schedule import evaluation_rungs
from finetune.engine.steps import RunSteps
from finetune.errors import Diverged
from finetune.files.run_folder import Metrics, RunFolder, remove_old_checkpoints
from finetune.tracking.tracker import Tracker

log = logging.getLogger(__name__)


class Reporter:
    """Takes each step's figures from an engine; logs, evaluates and decides whether to go on.

    Both engines use it, so that what is logged and when does not depend on the engine.
    """

    def __init__(
        self,
        config: RunConfig,
        progress: Progress,
        total: int,
        folder: RunFolder,
        tracker: Tracker,
        observer: Observer,
        interrupt: Interrupt,
        evaluate: Callable[[], RunSteps[Metrics]] | None,
        keep_best: Callable[[int], None],
        bar: bool = True,
    ) -> None:
        self.state, self.total = progress, total
        self._config, self._folder, self._tracker, self._observer = config, folder, tracker, observer
        self._interrupt, self._evaluate, self._keep_best = interrupt, evaluate, keep_best
        self._rungs = evaluation_rungs(config.trainer.eval_steps, total)
        self._shows_bar = bar and sys.stderr.isatty()

    @contextmanager
    def live(self) -> Iterator[None]:
        """While training goes on: signals end it cleanly, with a checkpoint; a progress bar, if there is a terminal."""
        with ExitStack() as contexts:
            contexts.enter_context(self._interrupt.listening())
            if self._shows_bar:
                contexts.enter_context(logging_redirect_tqdm())
            bar = tqdm(total=self.total, desc="training", unit="step", disable=not self._shows_bar)
            self._bar = contexts.enter_context(bar)
            yield

    def begin(self) -> RunSteps[None]:
        """Evaluate before the first step; a resumed run already has."""
        self._bar.update(self.state.step)
        if self.state.step == 0:
            yield from self._rung(0)

    def saved(self, checkpoint: Path, keep: int | None) -> None:
        """Finish a checkpoint that the engine has written, and remove those that are not kept (None: keep all).

        The run's state is written last: a checkpoint without it was cut short and is not resumed from.
        """
        self.state.save(checkpoint)
        remove_old_checkpoints(checkpoint.parent, keep, self.state.best_step)

    def step(
        self, step: int, loss: float, grad_norm: float | None, learning_rate: float, tokens: int, seconds: float
    ) -> RunSteps[None]:
        """Take an optimizer step's figures: mean loss of its tokens, gradient norm before clipping, tokens trained."""
        state = self.state
        state.step = step
        state.train_tokens += tokens
        state.train_seconds += seconds
        state.window_losses.append(loss)
        state.window_tokens += tokens
        state.window_seconds += seconds
        self._refuse_sickness(step, loss, grad_norm)
        self._bar.update()
        if step % self._config.trainer.logging_steps == 0 or step == self.total:
            metrics = {
                "train/loss": math.fsum(state.window_losses) / len(state.window_losses),
                "train/learning_rate": learning_rate,
                "train/tokens_per_second": state.window_tokens / max(state.window_seconds, 1e-9),
            }
            if grad_norm is not None:
                metrics["train/grad_norm"] = grad_norm
            state.train_loss = metrics["train/loss"]
            self._log(step, metrics)
            self._show(step, metrics)
            state.window_losses, state.window_tokens, state.window_seconds = [], 0, 0.0
        if step in self._rungs:
            yield from self._rung(step)
        if state.stop is None and step < self.total:
            if self._interrupt.asked:
                state.stop = "interrupted"
            elif self._observer.on_step(step):
                state.stop = "pruned"

    def _refuse_sickness(self, step: int, loss: float, grad_norm: float | None) -> None:
        # A gradient that overflows alone is no divergence: float16's loss scaling skips such a step.
        rate = self._config.optimizer.resolved_learning_rate
        if not math.isfinite(loss):
            raise Diverged(f"optimizer.learning_rate={rate}: training diverged at step {step} (loss {loss}); lower it")
        if grad_norm == 0 and self.state.silent_steps == step - 1:
            self.state.silent_steps = step
            if step == 3:
                raise RuntimeError("no gradient reaches the adapter: the first three steps had a gradient norm of 0")

    def _show(self, step: int, metrics: Metrics) -> None:
        """On a terminal beside the bar, elsewhere as a line."""
        loss, speed = metrics["train/loss"], metrics["train/tokens_per_second"]
        if not self._shows_bar:
            log.info("step %d/%d  loss %.4f  %.0f tokens/s", step, self.total, loss, speed)
        else:
            self._bar.set_postfix_str(f"loss {loss:.3f}, {speed:.0f} tokens/s")

    def _log(self, step: int, metrics: Metrics) -> None:
        self._folder.log(step, metrics)
        self._tracker.log(step, metrics)

    def _rung(self, step: int) -> RunSteps[None]:
        if self._evaluate is None:
            return
        metrics = yield from self._evaluate()
        state = self.state
        names = self._config.objectives
        if len(names) == 1 and names[0] in metrics:
            metrics["objective"] = metrics[names[0]]
        rung = Rung(self._rungs[step], step, self.total, metrics)
        state.rungs.append(asdict(rung))
        self._log(step, metrics)
        log.info("step %d/%d  held-out loss %.4f", step, self.total, metrics["eval/loss"])
        if not math.isfinite(metrics["eval/loss"]):
            rate = self._config.optimizer.resolved_learning_rate
            raise Diverged(f"eval/loss={metrics['eval/loss']} at step {step}: lower optimizer.learning_rate={rate}")
        self._note_best(step, metrics)
        patience = self._config.trainer.early_stopping_patience
        self._observer.on_rung(rung)
        yield None
        if self._observer.judge(rung):
            state.stop = "pruned"
        elif patience is not None and state.rungs_without_better >= patience and step < self.total:
            state.stop = "early"

    def _note_best(self, step: int, metrics: Metrics) -> None:
        state, value = self.state, metrics.get("objective")
        if value is None:
            return
        smaller_is_better = self._config.objective != "eval/accuracy"
        if state.best is None or (value < state.best if smaller_is_better else value > state.best):
            state.best, state.best_step, state.rungs_without_better = value, step, 0
            if self._config.objective_at == "best":
                self._keep_best(step)
        else:
            state.rungs_without_better += 1
