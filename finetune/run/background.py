"""Work in a thread, beside the other runs of the process."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.002
"""How long a run waits for its thread before the other runs of its process may train."""


def start_thread(work: Callable[[], T]) -> Future[T]:
    """Call a function in a thread that does not keep an interrupted process from its end."""
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future
