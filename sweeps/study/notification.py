"""Tells the user's `notify.command` how a session of a study ends, and when the study stalls.

The process of the sweep command tells, not its workers, so there is one notification for each
event. Two sessions of one study that end at the same time tell of it once.

Whatever the disk or the storage does meanwhile, the notification is made, and what has ended the
session stays the error: at worst an event is told of twice.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from finetune.config.sections.notify import NotifySettings
from finetune.console import error_line
from finetune.errors import Interrupted
from finetune.files.lock import file_lock
from finetune.notification import Event, notify
from sweeps.study.claims import trials_elsewhere
from sweeps.study.errors import StorageLost
from sweeps.study.formatting import format_counts
from sweeps.study.study import ANSWER, Study

log = logging.getLogger(__name__)

LAST_STEP = ".last-step"
"""File in the study's folder, written when a trial makes a step; only where a stall is told of."""

STALLED = ".stalled"
"""File in the study's folder, written when a stall was told of."""

NOTIFIED = "notified"
"""Attribute of the study: when each event was told of last, and after how many finished trials."""


@contextlib.contextmanager
def notified_at_end(study: Study, settings: NotifySettings) -> Iterator[None]:
    """Tell how the block ends, a session of a study."""
    began = time.time()
    event: Event = "completed"
    line = ""
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as error:
        event, line = "interrupted", error_line(error)
        raise
    except Exception as error:
        event, line = "failed", error_line(error)
        raise
    finally:
        if settings.command:
            _tell(study, settings, event, line, began)


def _tell(
    study: Study, settings: NotifySettings, event: Event, line: str, began: float
) -> None:
    counts = ""
    try:
        with file_lock(study.folder / ".notify.lock"):
            if _is_for_another_session(study, event, began):
                return
            counts = format_counts(study)
    # As the line then says.
    except StorageLost:
        pass
    # The system's, as where the disk is full, and the storage's, of any kind.
    except Exception as error:
        log.warning(
            "study %s: %s is not noted: %s", study.name, event, error_line(error)
        )
    text = "; ".join(part for part in (counts, line) if part)
    message = f"study {study.name} {event}: {text}"
    notify(settings, event, study.name, study.folder / ANSWER, message)


def _is_for_another_session(study: Study, event: Event, began: float) -> bool:
    """Return whether another session has told of the same event, or will; else note this one."""
    # Running trials without a worker wait for a later session, which is not there yet.
    if event == "completed" and trials_elsewhere(study):
        return True
    earlier = study.optuna.user_attrs.get(NOTIFIED, {})
    finished = len(study.finished())
    if event in earlier:
        at, trials = earlier[event]
        if at >= began and trials == finished:
            return True
    study.optuna.set_user_attr(NOTIFIED, {**earlier, event: [time.time(), finished]})
    return False


def tells_of_stalls(settings: NotifySettings) -> bool:
    """Return whether a study's steps have to be recorded."""
    return bool(settings.command) and settings.stalled_minutes is not None


def record_step(study: Study, settings: NotifySettings) -> None:
    """Record that a trial has made a step just now."""
    if tells_of_stalls(settings):
        # The trial goes on; at worst a stall is told of that is none.
        with contextlib.suppress(OSError):
            _touch(study.folder / LAST_STEP)


@contextlib.contextmanager
def stall_watch(study: Study, settings: NotifySettings) -> Iterator[None]:
    """Tell while the block lasts that no trial has made a step for `notify.stalled_minutes`.

    Once, until a step is made again. A thread sleeps until the last known step is so long ago.
    """
    if not tells_of_stalls(settings):
        yield
        return
    has_ended = threading.Event()
    arguments = (study.folder, study.name, settings, has_ended)
    thread = threading.Thread(target=_watch, args=arguments, daemon=True)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()


def _watch(
    folder: Path, name: str, settings: NotifySettings, has_ended: threading.Event
) -> None:
    # It reads files only: the study's storage belongs to the main thread.
    assert settings.stalled_minutes is not None
    limit = settings.stalled_minutes * 60
    began = time.time()
    told_of = None
    while True:
        last_step = max(began, _written_at(folder / LAST_STEP))
        if not has_ended.wait(max(0.0, last_step + limit - time.time())):
            if _written_at(folder / LAST_STEP) > last_step:
                continue
            if told_of != last_step:
                told_of = last_step
                _tell_of_stall(folder, name, settings, last_step)
        if has_ended.wait(limit):
            return


def _tell_of_stall(
    folder: Path, name: str, settings: NotifySettings, last_step: float
) -> None:
    try:
        with file_lock(folder / ".notify.lock"):
            if _written_at(folder / STALLED) >= last_step:
                return
            _touch(folder / STALLED)
    except OSError as error:
        log.warning("study %s: stalled is not noted: %s", name, error_line(error))
    minutes = f"{settings.stalled_minutes:g} minutes"
    message = f"study {name} stalled: no trial has made a step for {minutes}"
    notify(settings, "stalled", name, folder / ANSWER, message)


def _touch(path: Path) -> None:
    # By the clock of this machine, with which it is compared; a file server may have another one.
    path.touch()
    os.utime(path, (time.time(),) * 2)


def _written_at(path: Path) -> float:
    """Return the Unix time of a file's last change; 0 without a file that can be read."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
