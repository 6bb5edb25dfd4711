"""Log lines of runs that train together in one process."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class RunNameFormatter(logging.Formatter):
    """Puts the name of the run that is working before each of its lines.

    Args:
        inner: the formatter of the lines themselves.
    """

    run_name: str | None = None
    """The run that is working now, in this process; None: no run."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        text = self._inner.format(record)
        if self.run_name is None:
            return text
        return "\n".join(f"{self.run_name}: {line}" for line in text.splitlines())


@contextmanager
def run_lines_to_files(warnings_only: bool = False) -> Iterator[None]:
    """Keep the lines of runs off the terminal; they are in each run's own log file.

    Args:
        warnings_only: whether to keep the study's own lines off the terminal too, because another
            process draws a live table there.
    """

    def is_shown(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            return True
        return record.name.startswith("sweeps") and not warnings_only

    terminal_handlers = []
    for handler in logging.getLogger().handlers:
        # A file handler is a stream handler too.
        is_stream = isinstance(handler, logging.StreamHandler)
        if is_stream and not isinstance(handler, logging.FileHandler):
            terminal_handlers.append(handler)
    for handler in terminal_handlers:
        handler.addFilter(is_shown)
    try:
        yield
    finally:
        for handler in terminal_handlers:
            handler.removeFilter(is_shown)
