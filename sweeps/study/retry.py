"""Repeat the calls of a study's database while its server is out of reach."""

import functools
import logging
import random
import time
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import (
    DBAPIError,
    InterfaceError,
    OperationalError,
    PendingRollbackError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from finetune.config.addresses import hide_secrets
from finetune.config.secrets import STORAGE_KEY
from finetune.console import summary_line
from sweeps.study.errors import StorageLost

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0
"""Seconds between two attempts; the pause doubles from the first to the longest."""


def is_connection_error(error: BaseException | None) -> bool:
    """Whether an error is one of the connection or the server, not of the data."""
    # Optuna raises this for every commit that fails, whatever its reason.
    if isinstance(error, StorageInternalError):
        error = error.__cause__
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    connection_errors = (
        OperationalError,
        InterfaceError,
        PendingRollbackError,
        PoolTimeoutError,
    )
    return isinstance(error, connection_errors)


def server_message(error: BaseException, address: str) -> str:
    """Return the message of the server or its driver, on one line without secrets."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    # The driver's error: SQLAlchemy's message around it repeats the statement.
    original = cause.orig if isinstance(cause, DBAPIError) else cause
    return hide_secrets(summary_line(original or error), STORAGE_KEY, address)


class Retry:
    """The attempts of one call while the server is out of reach.

    Args:
        shown_address: the database's address without secrets, for log lines.
        retry_seconds: seconds from the first failed attempt to the last; 0: one attempt, without
            log lines.
    """

    def __init__(self, shown_address: str, retry_seconds: float) -> None:
        self._shown_address = shown_address
        self._retry_seconds = retry_seconds
        self._first_failure: float | None = None
        self._pause = FIRST_PAUSE

    def is_exhausted(self, reason: str) -> bool:
        """Count a failed attempt; return whether it was the last."""
        now = time.monotonic()
        if self._first_failure is None:
            self._first_failure = now
            if self._retry_seconds > 0:
                message = "%s is out of reach (%s): trying again for %.0f s"
                log.warning(message, self._shown_address, reason, self._retry_seconds)
        return now - self._first_failure >= self._retry_seconds

    def pause(self) -> None:
        """Wait before the next attempt, longer each time."""
        # At random, so that workers that lost the server together do not come back together.
        time.sleep(self._pause * random.uniform(0.5, 1.0))
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def succeed(self) -> None:
        """Log that the server is back, if it was out of reach."""
        if self._first_failure is not None and self._retry_seconds > 0:
            seconds = time.monotonic() - self._first_failure
            log.warning("%s is back after %.0f s", self._shown_address, seconds)


def retried(
    method: "Callable[Concatenate[Any, P], R]",
) -> "Callable[Concatenate[Any, P], R]":
    """Wrap a method of `Database` so that it is retried after a lost connection."""

    def call(self: Any, /, *arguments: P.args, **keywords: P.kwargs) -> R:
        retry_seconds = 0.0 if self.is_lost else self.retry_seconds
        retry = Retry(self.shown_address, retry_seconds)
        while True:
            try:
                result = method(self, *arguments, **keywords)
            except Exception as error:
                if not is_connection_error(error):
                    raise
                reason = server_message(error, self.address)
                if retry.is_exhausted(reason):
                    self.is_lost = True
                    message = f"{STORAGE_KEY}: {self.shown_address} stays out of reach ({reason})"
                    raise StorageLost(message) from None
            else:
                self.is_lost = False
                self.note_call()
                retry.succeed()
                return result
            retry.pause()

    functools.update_wrapper(call, method)
    return call
