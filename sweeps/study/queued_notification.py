"""Tells the user's `notify.command` how a session in the jobs of a queue ends.

The job that ends last tells, or the command that waits for the jobs: of each event once. A job that
begins again has not ended.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.sections.notify import NotifySettings
from finetune.console import error_line
from finetune.exit_codes import INTERRUPTED
from finetune.files.atomic import read_json, write_json
from finetune.notification import Event, notify
from sweeps.study.queued_jobs import OUTCOME, numbers_in_queue, queued_logs

log = logging.getLogger(__name__)

TOLD = ".told-"
"""Begins the names of files in the study's folder: the events that the session has told of."""


@dataclass(frozen=True)
class QueuedStudy:
    """The study of a session in a queue; it need not have begun."""

    name: str
    folder: Path
    notify: NotifySettings

    def begin_session(self) -> None:
        """Forget what an earlier session has told of."""
        for mark in self.folder.glob(f"{TOLD}*"):
            mark.unlink(missing_ok=True)

    def tell(self, event: Event, text: str) -> None:
        """Tell of an event, unless this session has told of it.

        Args:
            event: how the session has ended.
            text: the error, or what the study holds.
        """
        from sweeps.study.study import ANSWER

        try:
            (self.folder / f"{TOLD}{event}").open("x").close()
        except FileExistsError:
            return
        # At worst it is told of twice.
        except OSError as error:
            line = error_line(error)
            log.warning("study %s: %s is not noted: %s", self.name, event, line)
        message = f"study {self.name} {event}: {text}"
        notify(self.notify, event, self.name, self.folder / ANSWER, message)

    def tell_error(self, code: int, line: str) -> None:
        """Tell of what has ended the session, unless the study is completed all the same.

        Args:
            code: the exit code.
            line: the error.
        """
        if not (self.folder / f"{TOLD}completed").exists():
            self.tell("interrupted" if code == INTERRUPTED else "failed", line)

    def end_job(self, logs: Path, number: str, code: int, line: str | None) -> None:
        """Record how a job has ended; if it is the session's last one, tell of an error.

        Args:
            logs: the folder of the job's log.
            number: the job's number.
            code: its exit code.
            line: its error; None: it has none.
        """
        outcome = {"exit_code": code, "error": line}
        outcomes: list[dict[str, Any]] = [outcome]
        try:
            # First, so that of jobs that end together one at least sees the outcomes of all.
            write_json(logs / OUTCOME, outcome)
            queued = queued_logs(self.folder)
            # Else they are those of an earlier session: these are being queued.
            others = queued if number in queued else {}
            ended = {
                other: read_json(others[other] / OUTCOME)
                for other in others
                if other != number
            }
            if _are_left(ended):
                return
            outcomes += filter(None, ended.values())
        except OSError as error:
            log.warning("study %s: its jobs: %s", self.name, error_line(error))
        errors = [job for job in outcomes if job["error"] is not None]
        if errors:
            self.tell_error(errors[0]["exit_code"], errors[0]["error"])


def _are_left(outcomes: Mapping[str, Any]) -> bool:
    """Whether one of some jobs runs, or waits in the queue: it has no outcome, and is in the queue.

    Args:
        outcomes: the jobs' outcomes by their numbers.
    """
    unended = {number for number, outcome in outcomes.items() if outcome is None}
    return bool(unended and numbers_in_queue(unended))
