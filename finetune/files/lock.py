"""A lock file between processes that the system frees when its holder dies.

A held lock proves that its holder is alive: this is how a study tells a running trial from one
whose worker was killed. So a file system without `flock` is an error, not a reason for a weaker
lock.
"""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

POLL_INTERVAL = 0.005
"""Seconds between two attempts to take a lock that is held: appends to a journal take about one."""


@contextlib.contextmanager
def file_lock(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold a lock file; the file stays in place afterwards, empty.

    The lock is not reentrant. It is not inherited by a forked process.

    Args:
        path: The lock file, created if missing.
        wait: Wait until the lock is free.

    Raises:
        BlockingIOError: `wait` is false and the lock is held.
        OSError: The file system has no locks, or the file can't be created.
    """
    from filelock import FileLock, SoftFileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=-1 if wait else 0, poll_interval=POLL_INTERVAL)
    except Timeout:
        raise BlockingIOError(f"{path}: the lock is held") from None
    try:
        # filelock turns into this class where there is no flock: its locks outlive their holders.
        if isinstance(lock, SoftFileLock):
            raise OSError(errno.ENOSYS, "the file system has no locks", str(path))
        yield
    finally:
        lock.release()
