"""The report of a study that grows: built again when the study has changed, and never written."""

import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from optuna.trial import TrialState

from sweeps.answer.advice import Analysis, analyze
from sweeps.answer.report import render_page
from sweeps.answer.report_data import ReportData
from sweeps.study.find_study import is_plain_multirun, load_study
from sweeps.study.in_memory import snapshot
from sweeps.study.storage import JOURNAL
from sweeps.study.study import ANSWER, CONFIRMATION, Study

REST = 4.0
"""Between two builds at least so many times the duration of the last one: the study trains on the
same machine."""

NEW_TRIALS = 0.1
"""Share of new trials from which on a study that runs is analysed again."""

STUDY_FILES = (JOURNAL, ANSWER, CONFIRMATION, "best/samples.json")
"""Files of a study that the page shows; with a database, its trials are read besides."""

JOB_FILES = ("trials/*/result.json", "trials/*/metrics.jsonl", "refused.jsonl")
"""Files of a plain multirun that the page shows."""


@dataclass(frozen=True)
class Page:
    """The page at one time."""

    html: str
    version: str
    """Another text for each page, also after a restart."""
    state: object
    """What the study was like: an equal one needs no new page."""


class LivePage:
    """The page of one study. Several threads may ask for it at once.

    Args:
        folder: the study's folder.

    Raises:
        ConfigError: the study can't be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.builds = 0
        """How often the page was built."""
        self._study = load_study(folder)
        self._is_multirun = is_plain_multirun(folder)
        self._lock = threading.Lock()
        self._analysis: Analysis | None = None
        self._analysed = 0
        self._start = secrets.token_hex(4)
        self._rests_until = 0.0
        self._page = self._build(self._state())

    def current(self) -> Page:
        """Return the page, built again if the study has changed.

        While another thread builds it, and for a while after that, it is the page of before.
        """
        if self._lock.acquire(blocking=False):
            try:
                self._refresh()
            finally:
                self._lock.release()
        return self._page

    def answer(self) -> bytes | None:
        """Return the content of `answer.json`; None: there is none yet."""
        try:
            return (self.folder / ANSWER).read_bytes()
        except FileNotFoundError:
            return None

    def _refresh(self) -> None:
        if time.monotonic() < self._rests_until:
            return
        state = self._state()
        if state != self._page.state:
            self._page = self._build(state)

    def _state(self) -> object:
        patterns = JOB_FILES if self._is_multirun else STUDY_FILES
        files = [
            (path.name, path.parent.name, *_read_stamp(path))
            for pattern in patterns
            for path in sorted(self.folder.glob(pattern))
        ]
        if not self._study.is_shared:
            return files
        trials = [
            (trial.state, trial.values, trial.intermediate_values, trial.user_attrs)
            for trial in self._study.trials()
        ]
        return files, repr(trials), self._study.optuna.user_attrs

    def _build(self, state: object) -> Page:
        began = time.monotonic()
        self.builds += 1
        version = f"{self._start}-{self.builds}"
        study = self._snapshot()
        data = ReportData.read(study, self._analyze(study))
        page = Page(render_page(data, version=version), version, state)
        now = time.monotonic()
        self._rests_until = now + REST * (now - began)
        return page

    def _analyze(self, study: Study) -> Analysis:
        """Return the importance of parameters and the advice, perhaps those of before.

        They take most of the time of a page: seconds from 20 trials on.
        """
        finished = len(study.finished())
        is_running = bool(study.trials(TrialState.RUNNING, TrialState.WAITING))
        has_grown = finished > self._analysed * (1 + NEW_TRIALS)
        if self._analysis is None or has_grown or not is_running:
            self._analysis = analyze(study)
            self._analysed = max(finished, 1)
        return self._analysis

    def _snapshot(self) -> Study:
        # The jobs of a multirun are read from their folders; a study's storage gives what is new.
        return load_study(self.folder) if self._is_multirun else snapshot(self._study)


def _read_stamp(path: Path) -> tuple[int, int] | tuple[()]:
    """Return when a file was written and its size; empty where it has gone meanwhile."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return ()
    return stat.st_mtime_ns, stat.st_size
