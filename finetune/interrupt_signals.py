"""Ctrl-C in code of libraries that is not made for it.

A module whose import is interrupted stays half initialised, and each later use of it in the process
fails. A command ends then anyway; a call from a notebook or a script is to leave a process in which
the next call works.

OmegaConf and argparse restore a half-changed object when they are interrupted, and may fail at
that: then their error is raised in place of KeyboardInterrupt, and tells of a mistake that nobody
made.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from finetune.errors import ConfigError, Interrupted

IMPORT_SYSTEM = "<frozen importlib._bootstrap>"
"""File name of the frames of Python's import system."""

RETRY_SECONDS = 0.05
"""After this time a signal that came during an import is sent again."""

REPLACED_SECONDS = 2.0
"""For so long after an interrupt an error of a library may be what it has made of the interrupt."""


Handler = Callable[[int, FrameType | None], object]
"""What is called for a signal, with its number and the interrupted frame."""


@contextlib.contextmanager
def interrupts_wait_for_imports() -> Iterator[None]:
    """Delay SIGINT within the block while a module is imported.

    Otherwise the handler of before gets it.
    """

    def delay(previous: Handler) -> Handler:
        def handle(number: int, frame: FrameType | None) -> None:
            if not send_after_import(number, frame):
                previous(number, frame)

        return handle

    with _changed_handler(signal.SIGINT, delay):
        yield


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


class RaisedInterrupts:
    """When KeyboardInterrupt was last raised for a signal."""

    def __init__(self) -> None:
        self.last: float | None = None
        """Seconds of the monotonic clock; None: never."""

    def explain(self, error: BaseException) -> bool:
        """Return whether an error that has just been raised replaces the interrupt.

        An error with a message for the user, and one of the machine, as of a full disk, are true
        also after Ctrl-C. So is one that comes later, where a command has handled the interrupt and
        gone on. Errors have no link to the interrupt where libraries remove it.
        """
        is_true = isinstance(error, ConfigError | Interrupted | OSError)
        if self.last is None or is_true or not isinstance(error, Exception):
            return False
        return time.monotonic() - self.last < REPLACED_SECONDS


@contextlib.contextmanager
def raised_interrupts() -> Iterator[RaisedInterrupts]:
    """Notice the KeyboardInterrupt that SIGINT or SIGTERM raises in the block."""
    raised = RaisedInterrupts()

    def notice(previous: Handler) -> Handler:
        def handle(number: int, frame: FrameType | None) -> None:
            try:
                previous(number, frame)
            except KeyboardInterrupt:
                raised.last = time.monotonic()
                raise

        return handle

    with (
        _changed_handler(signal.SIGINT, notice),
        _changed_handler(signal.SIGTERM, notice),
    ):
        yield raised


@contextlib.contextmanager
def _changed_handler(
    number: signal.Signals, change: Callable[[Handler], Handler]
) -> Iterator[None]:
    """Change what is called for a signal within the block.

    Nothing is changed where Python calls no handler for it, and in other threads than the main
    one, which get no signals.
    """
    previous = signal.getsignal(number)
    is_main = threading.current_thread() is threading.main_thread()
    if not (is_main and callable(previous)):
        yield
        return
    signal.signal(number, change(previous))
    try:
        yield
    finally:
        signal.signal(number, previous)
