"""Where a run's metrics go: `metrics.jsonl`, the tracker, and the terminal."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from finetune.config.sections.evaluation import LOSS_METRICS
from finetune.files.run_folder import Metrics, RunFolder
from finetune.tracking.tracker import Tracker

log = logging.getLogger(__name__)


class RunOutput:
    """Writes a run's metrics, and shows how far it is.

    On a terminal a progress bar shows the training loss, elsewhere a log line does.
    """

    def __init__(
        self,
        folder: RunFolder,
        tracker: Tracker,
        total: int,
        interactive: bool,
    ) -> None:
        """Write to a run's folder and tracker.

        Args:
            folder: The run's folder.
            tracker: The run's tracker.
            total: Optimizer steps of the whole run.
            interactive: Whether the run has the terminal to itself, so that it may show a bar.
        """
        self._folder = folder
        self._tracker = tracker
        self._total = total
        # tqdm draws on stderr.
        self._has_bar = interactive and sys.stderr.isatty()
        # Shows nothing, so that `advance` need not ask whether there is a bar.
        self._bar = tqdm(disable=True)

    @contextmanager
    def progress_bar(self) -> Iterator[None]:
        """Show the progress bar within the block, if there is a terminal; log lines go above it."""
        if not self._has_bar:
            yield
            return
        with (
            logging_redirect_tqdm(),
            tqdm(total=self._total, desc="training", unit="step") as self._bar,
        ):
            yield

    def advance(self, steps: int = 1) -> None:
        """Move the progress bar by a number of optimizer steps."""
        self._bar.update(steps)

    def log(self, step: int, metrics: Metrics) -> None:
        """Write the metrics of an optimizer step to the folder and the tracker."""
        self._folder.log(step, metrics)
        self._tracker.log(step, metrics)

    def show_training(self, step: int, metrics: Metrics) -> None:
        """Show `train/loss` and the speed on the bar, or as a log line without a terminal."""
        loss = metrics["train/loss"]
        speed = metrics["train/tokens_per_second"]
        if self._has_bar:
            self._bar.set_postfix_str(f"loss {loss:.3f}, {speed:.0f} tokens/s")
        else:
            log.info(
                "step %d/%d  loss %.4f  %.0f tokens/s", step, self._total, loss, speed
            )

    def show_evaluation(self, step: int, metrics: Metrics) -> None:
        """Log the loss on held-out rows, in nats per token, and the scores of answers."""
        values = ""
        for name, value in metrics.items():
            split, _, score = name.partition("/")
            if split == "eval" and score not in LOSS_METRICS:
                values += f"  {score} {value:.4f}"
        loss = metrics["eval/loss"]
        log.info("step %d/%d  held-out loss %.4f%s", step, self._total, loss, values)
