"""Trackers: where metrics are shown. A tracker never ends a run."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.console import summary_line
from finetune.files.run_folder import Metrics

log = logging.getLogger(__name__)


Sample = dict[str, str]
"""A `prompt`, the base's answer `before` training, and the answer `after` it; either is missing if asking failed."""


@dataclass(frozen=True)
class Label:
    """What a tracker calls a run that is part of a study."""

    id: str | None = None
    """W&B's id; None: drawn at random and kept in the run's folder."""
    name: str | None = None
    """What is shown; None: the run's own name."""
    group: str | None = None
    job_type: str = "run"


class Tracker:
    """Shows nothing; the others show what they are told."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Show metrics of an optimizer step."""

    def samples(self, step: int, samples: list[Sample]) -> None:
        """Show answers before and after."""

    def tag(self, tags: list[str]) -> None:
        """Mark the run with further tags."""

    def adapter(self, folder: Path) -> None:
        """Keep the run's adapter."""

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        """Close, with the run's final state."""

    def where(self) -> list[str]:
        """Lines that tell the user where to look."""
        return []


class SeveralTrackers(Tracker):
    """All of several, each on its own: one that fails is left out from then on, and the run goes on."""

    def __init__(self, openers: list[Callable[[], Tracker]]) -> None:
        self._trackers: list[Tracker] = []
        self._failed: list[Tracker] = []
        for opener in openers:
            try:
                self._trackers.append(opener())
            except Exception as error:
                log.warning("tracker: %s; the run goes on without it", summary_line(error))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in self._trackers:
            if tracker not in self._failed:
                try:
                    call(tracker)
                except Exception as error:
                    log.warning("%s: %s; the run goes on without it", type(tracker).__name__, summary_line(error))
                    self._failed.append(tracker)

    def log(self, step: int, metrics: Metrics) -> None:
        self._each(lambda tracker: tracker.log(step, metrics))

    def samples(self, step: int, samples: list[Sample]) -> None:
        self._each(lambda tracker: tracker.samples(step, samples))

    def tag(self, tags: list[str]) -> None:
        self._each(lambda tracker: tracker.tag(tags))

    def adapter(self, folder: Path) -> None:
        self._each(lambda tracker: tracker.adapter(folder))

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        self._each(lambda tracker: tracker.finish(status, summary))

    def where(self) -> list[str]:
        return [line for tracker in self._trackers for line in tracker.where()]
