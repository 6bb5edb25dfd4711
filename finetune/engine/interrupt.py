"""Ctrl-C and SIGTERM while runs train."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from finetune.interrupt_signals import send_after_import


class Interrupt:
    """A request to stop, by Ctrl-C, SIGTERM or code.

    Runs that share it end cleanly after their current step, with a checkpoint. A second signal
    raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.requested = False
        """Whether the runs should stop."""
        self._active_blocks = 0
        self._previous_handlers: dict[int, Any] = {}

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM within the block; blocks of several runs may overlap.

        Only the main thread can install handlers; in any other thread nothing is changed.
        """
        in_main_thread = threading.current_thread() is threading.main_thread()
        # The first of overlapping blocks installs the handlers, the last one restores them:
        # otherwise a later block would take this class's handler for the previous one.
        if self._active_blocks == 0 and in_main_thread:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous_handlers[number] = signal.signal(number, self._handle)
        self._active_blocks += 1
        try:
            yield
        finally:
            self._active_blocks -= 1
            if self._active_blocks == 0:
                self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Whoever asks twice does not want to wait for the current step.
        if self.requested and not send_after_import(number, frame):
            raise KeyboardInterrupt
        self.requested = True
