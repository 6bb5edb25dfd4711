"""Ctrl-C during an import waits for its end.

A module whose import is interrupted stays half initialised, and each later use of it in the process
fails. A command ends then anyway; a call from a notebook or a script is to leave a process in which
the next call works.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

IMPORT_SYSTEM = "<frozen importlib._bootstrap>"
"""File name of the frames of Python's import system."""

RETRY_SECONDS = 0.05
"""After this time a signal that came during an import is sent again."""


@contextlib.contextmanager
def interrupts_wait_for_imports() -> Iterator[None]:
    """Delay SIGINT within the block while a module is imported.

    Otherwise the handler of before gets it. Nothing is changed where there is none that Python
    calls, and in other threads than the main one, which get no signals.
    """
    previous = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not (is_main and callable(previous)):
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if not send_after_import(number, frame):
            previous(number, frame)

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def send_after_import(number: int, frame: FrameType | None) -> bool:
    """Return whether the interrupted code is within an import; if so, send the signal again later.

    Args:
        number: The signal.
        frame: The interrupted frame, as a signal handler gets it.
    """
    while frame is not None and frame.f_code.co_filename != IMPORT_SYSTEM:
        frame = frame.f_back
    if frame is None:
        return False
    timer = threading.Timer(RETRY_SECONDS, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()
    return True
