"""The places of a session's workers: at most one worker holds each, with its GPU.

When one worker is killed, launchers report that at once, while the other workers may live on: those
of submitit and Ray do. The session then starts all its workers again. A new worker waits until its
place is free: that of the killed worker is, those of the others are not before they have ended. So
each worker that lives keeps its base, and no two load one into the same GPU.
"""

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

from finetune.files.lock import file_lock
from sweeps.study.session import Session
from sweeps.study.sweeper_process import SweeperProcess

POLL_SECONDS = 1.0
"""Seconds between two attempts to take a place."""


@contextlib.contextmanager
def worker_place(session: Session, index: int) -> Iterator[None]:
    """Hold the place of a worker; wait while a worker of an earlier start holds it.

    Args:
        session: the session.
        index: the worker's number in the session, from 0.
    """
    path = _lock_path(session, index)
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(file_lock(path, wait=False))
                break
            except BlockingIOError:
                time.sleep(POLL_SECONDS)
        try:
            yield
        finally:
            if session.is_orphaned:
                # Nobody is left who would remove it.
                path.unlink(missing_ok=True)


def has_begun(session: Session) -> bool:
    """Whether a worker of the session has begun, on a machine that shares its folder."""
    return any(session.folder.glob(f"{session.file_prefix('worker')}-*.lock"))


def remove_free_places(session: Session) -> None:
    """Remove the lock files of workers that have ended, also of this host's killed sessions."""
    name = re.compile(rf"\.worker-{re.escape(session.sweeper.host)}-(\d+)-\d+\.lock")
    for path in session.folder.glob(".worker-*.lock"):
        match = name.fullmatch(path.name)
        if match is None:
            continue
        pid = int(match[1])
        # Another session that lives tells by its files whether its workers have begun.
        if pid != session.sweeper.pid and not SweeperProcess(pid).is_dead:
            continue
        # Under the lock, as a file that another worker has just opened is not the same later. On a
        # full disk it stays, and what has ended the session is the error.
        with contextlib.suppress(OSError), file_lock(path, wait=False):
            path.unlink(missing_ok=True)


def _lock_path(session: Session, index: int) -> Path:
    """Return the lock file of a place: of this session, as others may use other GPUs."""
    return session.folder / f"{session.file_prefix('worker')}-{index}.lock"
