"""Work on rows in chunks, by several processes where there are many rows."""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

from finetune.compat import hide_main_module
from finetune.data.types import Row

log = logging.getLogger(__name__)

CHUNK_ROWS = 1000

ROWS_PER_PROCESS = 5000
"""A process takes some seconds to import what it needs: for fewer rows it would not pay."""

MOST_PROCESSES = 8
"""Each takes about 200 MB of memory."""

SHOWN_AFTER = 2
"""Seconds after which a progress bar appears."""

Result = TypeVar("Result")

Task = Callable[[Sequence[Row]], Result]


def map_chunks(task: Task[Result], rows: Sequence[Row], title: str) -> Iterator[Result]:
    """Apply a task to the rows, `CHUNK_ROWS` at a time.

    Args:
        task: Is called with each chunk; must be possible to pickle.
        rows: All rows; must be possible to pickle.
        title: What the progress bar says, for example `comparing rows`.

    Yields:
        The results, in the order of the chunks.

    Raises:
        Exception: What the task raises first, by the order of the chunks.
    """
    starts = range(0, len(rows), CHUNK_ROWS)
    processes = min(process_limit(), len(rows) // ROWS_PER_PROCESS)
    if processes > 1:
        # A log file has no progress bar.
        log.info(
            "data: %s: %s, in %d processes",
            title,
            f"{len(rows):,}",
            processes,
        )
        results = _map_in_processes(task, rows, starts, processes)
    else:
        results = (task(rows[start : start + CHUNK_ROWS]) for start in starts)
    with progress_bar(title, len(rows)) as bar:
        for start, result in zip(starts, results, strict=True):
            yield result
            bar.update(min(CHUNK_ROWS, len(rows) - start))


def process_limit() -> int:
    """Return how many processes may work on rows: one for each CPU, within limits."""
    return min(len(os.sched_getaffinity(0)), MOST_PROCESSES)


def progress_bar(title: str, total: int | None = None) -> AbstractContextManager["Bar"]:
    """Return a progress bar of rows on stderr, which a terminal shows after `SHOWN_AFTER` seconds.

    Args:
        title: What it says.
        total: The number of rows; None: not known.
    """
    if not sys.stderr.isatty():
        return contextlib.nullcontext(Bar())
    from tqdm import tqdm

    bar: AbstractContextManager[Bar] = tqdm(
        desc=title,
        total=total,
        unit=" rows",
        leave=False,
        delay=SHOWN_AFTER,
    )
    return bar


class Bar:
    """A progress bar that is not shown, with the one method of tqdm that is used."""

    def update(self, count: int = 1) -> None:
        """Count further rows."""


def _map_in_processes(
    task: Task[Result], rows: Sequence[Row], starts: Sequence[int], processes: int
) -> Iterator[Result]:
    # Not forked: libraries have begun threads, and a GPU may be in use.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        processes,
        context,
        initializer=_begin_worker,
        initargs=(_Worker(task, rows),),
    )
    try:
        with hide_main_module(), _delay_signals():
            results = pool.map(_run_chunk, starts)
        yield from results
    finally:
        # After an error or an interruption the other chunks are not needed.
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _delay_signals() -> Iterator[None]:
    """Handle interruptions after the block, which starts processes.

    A process whose start is interrupted fails with a traceback, and its pool waits for it forever.
    """
    interruptions = (signal.SIGINT, signal.SIGTERM)
    received: list[int] = []
    handlers = {}
    # Python runs handlers in the main thread alone, whichever thread receives the signal.
    if threading.current_thread() is threading.main_thread():
        for number in interruptions:
            handlers[number] = signal.signal(
                number, lambda number, _: received.append(number)
            )
    # Processes inherit the mask, and never see Ctrl-C, which reaches all processes of a terminal:
    # the first one cancels the others' work.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, interruptions)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for received_number in received:
        signal.raise_signal(received_number)


class _Worker(Generic[Result]):
    """What a process works on; it is sent once to each."""

    current: "_Worker[Any]"

    def __init__(self, task: Task[Result], rows: Sequence[Row]) -> None:
        self.task = task
        self.rows = rows


def _begin_worker(worker: _Worker[Any]) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _Worker.current = worker


def _exit_with_parent() -> None:
    """End this process when its parent was killed, which can't tell it any more."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_chunk(start: int) -> Any:
    worker = _Worker.current
    return worker.task(worker.rows[start : start + CHUNK_ROWS])
