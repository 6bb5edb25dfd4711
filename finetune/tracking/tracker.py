"""Trackers show a run's metrics, samples and result outside its folder. They never end a run."""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.console import summary_line
from finetune.files.run_folder import Metrics
from finetune.tracking.text_privacy import HIDDEN

log = logging.getLogger(__name__)

Sample = dict[str, str]
"""A `prompt`, its `expected` answer, the answer `before` training, and the one `after` it.

A prompt of the config has no expected answer. An answer is missing if its generation failed.
"""

FINAL = "final/"
"""Begins the names of final values in trackers without a summary, as these may be those of an
earlier evaluation."""


@dataclass(frozen=True)
class Label:
    """How a tracker names a run that belongs to a study."""

    id: str | None = None
    """The id of the W&B run; None: drawn at random and kept in the run's folder."""
    name: str | None = None
    """The displayed name; None: the run's own name."""
    group: str | None = None
    """The study; None: the run belongs to none."""
    job_type: str | None = None
    """What the run is in its study; None: WANDB_JOB_TYPE, or `run`."""
    folder: Path | None = None
    """Where W&B keeps the files of all runs of the study; None: each run in its own folder."""


@contextlib.contextmanager
def ended_on_error(end: Callable[[], object]) -> Iterator[None]:
    """End a tracker's run if the block raises: nobody would end it later.

    Args:
        end: Ends it as failed; its own errors are not raised.
    """
    try:
        yield
    except BaseException:
        # The first error says more than that of a server which may be away.
        with contextlib.suppress(Exception):
            end()
        raise


class Tracker:
    """The base class of trackers, with hooks that do nothing. A subclass overrides those it needs.

    The hooks are called in the order of their definition. A run calls `log` at many steps, the
    others at its end. A hook may raise any exception: `SeveralTrackers` logs it as a warning, and
    calls `finish` to end the tracker's run as failed; again at the run's end if that fails.
    """

    def log(self, step: int, metrics: Metrics) -> None:
        """Show metrics.

        Args:
            step: The optimizer step; it never decreases.
            metrics: Values by name, as in `metrics.jsonl`.
        """

    def log_samples(self, step: int, samples: list[Sample]) -> None:
        """Show the answers to the sample prompts, before and after training."""

    def add_tags(self, tags: list[str]) -> None:
        """Add tags to the run; those that it has stay."""

    def log_adapter(self, folder: Path) -> None:
        """Store the trained adapter, all files of a folder. They may be removed afterwards."""

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        """Close the tracker; no hook but `locations` is called afterwards.

        Args:
            status: `completed`, `pruned`, `failed` or `interrupted`.
            summary: The final state, as `final_summary` returns it.
        """

    def locations(self) -> list[str]:
        """Return lines that tell the user where to look at the run."""
        return []


class SeveralTrackers(Tracker):
    """Calls each of several trackers. One that fails is not called again, and the run continues.

    Args:
        openers: Open one tracker each.
        shows_text: Whether the trackers get prompts and answers (`tracker.text`).
    """

    def __init__(
        self, openers: list[Callable[[], Tracker]], shows_text: bool = True
    ) -> None:
        self._shows_text = shows_text
        self._trackers: list[Tracker] = []
        self._failed: list[Tracker] = []
        self._left_open: list[tuple[Tracker, str]] = []
        """Failed trackers whose runs could not be ended, and the errors: a server was away."""
        # A wrong key of W&B, or a package that is not installed, must not cost the run.
        for opener in openers:
            try:
                self._trackers.append(opener())
            except Exception as error:
                log.warning("tracker: %s; the run goes on without it", reason(error))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        self._end_as_failed(self._call(call))

    def _call(self, call: Callable[[Tracker], None]) -> list[tuple[Tracker, str]]:
        """Call each tracker; return those that have failed now, with their errors."""
        failed_now: list[tuple[Tracker, str]] = []
        for tracker in self._trackers:
            if tracker in self._failed:
                continue
            try:
                call(tracker)
            except Exception as error:
                name = type(tracker).__name__
                cause = reason(error)
                log.warning("%s: %s; the run goes on without it", name, cause)
                self._failed.append(tracker)
                failed_now.append((tracker, cause))
        return failed_now

    def _end_as_failed(self, failed: list[tuple[Tracker, str]]) -> None:
        """End the runs of failed trackers, which would be shown as running for ever."""
        for tracker, cause in failed:
            error = f"tracker: {cause if self._shows_text else HIDDEN}"
            try:
                tracker.finish("failed", {"error": error})
            except Exception:
                self._left_open.append((tracker, cause))

    def log(self, step: int, metrics: Metrics) -> None:
        self._each(lambda tracker: tracker.log(step, metrics))

    def log_samples(self, step: int, samples: list[Sample]) -> None:
        if not self._shows_text:
            return
        self._each(lambda tracker: tracker.log_samples(step, samples))

    def add_tags(self, tags: list[str]) -> None:
        self._each(lambda tracker: tracker.add_tags(tags))

    def log_adapter(self, folder: Path) -> None:
        self._each(lambda tracker: tracker.log_adapter(folder))

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        left_open, self._left_open = self._left_open, []
        self._end_as_failed(left_open)
        # It is not called again where it fails: it ends a run as far as that is possible.
        self._call(lambda tracker: tracker.finish(status, summary))

    def locations(self) -> list[str]:
        lines: list[str] = []
        for tracker in self._trackers:
            lines += tracker.locations()
        return lines


def reason(error: Exception) -> str:
    """Return the beginning of a tracker's error, without the user and password of an address."""
    return re.sub(r"//[^/\s]*@", "//", summary_line(error))


def final_summary(result: dict[str, Any], shows_text: bool) -> dict[str, Any]:
    """Return a run's final state for `Tracker.finish`.

    Args:
        result: The content of its `result.json`.
        shows_text: Whether trackers may show texts; the message of an error may quote a row.
    """
    summary = dict(result["metrics"])
    if result["status"] == "pruned":
        summary["pruned_at"] = result["step"]
    error = result["error"]
    summary["error"] = HIDDEN if error and not shows_text else error
    return summary
