"""Ctrl-C and SIGTERM while runs train."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupt:
    """Ctrl-C and SIGTERM while runs train: they end cleanly, after the step in progress. A second one ends at once."""

    def __init__(self) -> None:
        self.asked = False
        self._listeners = 0
        self._before: dict[int, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear them as long as any run listens, whichever ends first. Only the main thread can."""
        if self._listeners == 0 and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        self._listeners += 1
        try:
            yield
        finally:
            self._listeners -= 1
            if self._listeners == 0:
                for number, previous in self._before.items():
                    signal.signal(number, previous)
                self._before = {}

    def _hear(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
