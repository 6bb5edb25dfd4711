"""What an engine and the rest of a run tell each other while training goes on."""

import logging
import math
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from finetune.config import ConfigError, RunConfig
from finetune.records import PROGRESS, Metrics, RunFolder, read_json, remove_old_checkpoints, write_json
from finetune.trackers import Tracker

log = logging.getLogger(__name__)

T = TypeVar("T")


class Wish(Protocol):
    """Something that a run wants computed."""

    @property
    def bank(self) -> Any:
        """What computes it, together with what other runs want at the same time."""


Turns = Generator[Wish | None, Any, T]
"""Work that takes turns with other runs' in one process.

It yields what it wants computed and is sent what came of it; None lets all others of the same turn come as far first.
"""


def alone(work: Turns[T]) -> T:
    """Do work to its end with nobody beside it."""
    answer: Any = None
    try:
        while True:
            wish = work.throw(answer) if isinstance(answer, Exception) else work.send(answer)
            answer = None if wish is None else wish.bank.grant([wish])[0]
    except StopIteration as end:
        result: T = end.value
        return result


@dataclass(frozen=True)
class Rung:
    """An evaluation: a point where a run reports its objective and may be stopped."""

    index: int
    """How many times as far it is as the first one after training began; 0 is before the first step."""
    step: int
    total: int
    """Steps that the run shall have."""
    metrics: Metrics


class Observer:
    """Hears of every step and every rung, and may stop the run there. This one lets it go on.

    Runs that began together report the same rung before any of them is judged there.
    """

    def on_step(self, step: int) -> bool:
        """Whether the run shall stop after this optimizer step, pruned."""
        return False

    def on_rung(self, rung: Rung) -> None:
        """Take the report."""

    def judge(self, rung: Rung) -> bool:
        """Whether the run shall stop here, pruned."""
        return False

    def on_completed(self, metrics: Metrics) -> list[str]:
        """Tags for the run that has reached its end."""
        return []


class Interrupt:
    """Ctrl-C and SIGTERM while runs train: they end cleanly, after the step in progress. A second one ends at once."""

    def __init__(self) -> None:
        self.asked = False
        self._listeners = 0
        self._before: dict[int, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear them as long as any run listens, whichever ends first. Only the main thread can."""
        if self._listeners == 0 and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        self._listeners += 1
        try:
            yield
        finally:
            self._listeners -= 1
            if self._listeners == 0:
                for number, previous in self._before.items():
                    signal.signal(number, previous)
                self._before = {}

    def _hear(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class Diverged(ConfigError):
    """The loss or the gradient is no number any more."""


def steps_of(setting: float, total: int) -> int:
    """A number of steps from a setting that may be a share of them all; 0 stays 0: never."""
    return max(1, math.ceil(setting * total)) if 0 < setting < 1 else int(setting)


def rungs_of(setting: float | list[float], total: int) -> dict[int, int]:
    """The steps of a run after which it is evaluated, and each one's index: how many times as far as the first.

    They are every so many steps, or those of a list, and the last one in any case.
    """
    if isinstance(setting, list):
        points = sorted(part * total if part < 1 else part for part in setting if part)
    else:
        every = steps_of(setting, total)
        points = [*range(every, total, every)] if every else []
    points = [*(point for point in points if point < total), total]
    rungs = {0: 0}
    for point in points:
        index = max(round(point / points[0]), max(rungs.values()) + 1)
        rungs.setdefault(math.ceil(point), index)
    return rungs


def total_steps(config: RunConfig, rows: int) -> int:
    """Optimizer steps of a run on so many rows (or packed sequences)."""
    trainer = config.trainer
    if trainer.max_steps > 0:
        return trainer.max_steps
    batches = math.ceil(rows / trainer.per_device_train_batch_size)
    return math.ceil(trainer.num_train_epochs * math.ceil(batches / trainer.gradient_accumulation_steps))


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
        evaluate: Callable[[], Turns[Metrics]] | None,
        keep_best: Callable[[int], None],
        bar: bool = True,
    ) -> None:
        self.state, self.total = progress, total
        self._config, self._folder, self._tracker, self._observer = config, folder, tracker, observer
        self._interrupt, self._evaluate, self._keep_best = interrupt, evaluate, keep_best
        self._rungs = rungs_of(config.trainer.eval_steps, total)
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

    def begin(self) -> Turns[None]:
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
    ) -> Turns[None]:
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
        rate = self._config.optimizer.learning_rate
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

    def _rung(self, step: int) -> Turns[None]:
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
            raise Diverged(f"eval/loss={metrics['eval/loss']} at step {step}: lower optimizer.learning_rate")
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
