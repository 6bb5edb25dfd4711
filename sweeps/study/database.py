"""A study's database: a storage whose calls are retried after a lost connection.

A lost connection is no trial's failure: the call is retried, and `StorageLost` ends the worker
where the server stays out of reach. The commit of a call may have happened before its connection
was lost, so each write must be safe to repeat.
"""

import functools
import logging
import random
import re
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import (
    DBAPIError,
    InterfaceError,
    OperationalError,
    PendingRollbackError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from finetune.config.addresses import hide_secrets, parse_address, show_address
from finetune.config.secrets import STORAGE_KEY
from finetune.console import summary_line
from sweeps.compat import RDB_CALLS, claim_waiting_trial, trial_row
from sweeps.study.drivers import choose_driver
from sweeps.study.errors import StorageLost

if TYPE_CHECKING:
    from sqlalchemy.engine import URL
    from sqlalchemy.orm import Session

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
Storage = TypeVar("Storage", bound=type)

RETRY_SECONDS = 120.0
"""Seconds for which a call is retried while the server is out of reach."""

OPENING_RETRY_SECONDS = 30.0
"""The same while a database is opened, when no work could be lost yet."""

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0
"""Seconds between two attempts; the pause doubles from the first to the longest."""

CONNECTION = {"connect_timeout": 10, "keepalives_idle": 30, "tcp_user_timeout": 60_000}
"""Arguments of libpq (s, s, ms), by which a server that was switched off is noticed in a minute."""

CLAIM = "claim"
"""The system attribute of a trial that holds the token of the call which began it."""

_REFUSED = re.compile(
    r"(?i)authentication failed|no password supplied|access denied|does not exist|unknown database"
    r"|could not translate host|name or service not known|unable to open database file"
)
"""A server's messages about a wrong address, where a retry can't help."""


def open_database(address: str, retry_seconds: float | None) -> "Database":
    """Open a database, retrying while its server is out of reach.

    Args:
        address: the database's address.
        retry_seconds: seconds for which calls are retried; None: `RETRY_SECONDS`.

    Raises:
        ConfigError: the address is none, or no driver for it is installed.
        Exception: the last error of the server, its driver or SQLAlchemy.
    """
    url = choose_driver(parse_address(STORAGE_KEY, address))
    seconds = RETRY_SECONDS if retry_seconds is None else retry_seconds
    shown_address = show_address(STORAGE_KEY, address)
    retry = _Retry(shown_address, min(seconds, OPENING_RETRY_SECONDS))
    while True:
        try:
            return Database(url, address, seconds)
        except Exception as error:
            reason = _reason(error, address)
            can_recover = is_connection_error(error) and not _REFUSED.search(reason)
            if not can_recover or retry.is_exhausted(reason):
                raise
        retry.pause()


def is_connection_error(error: BaseException | None) -> bool:
    """Whether an error is one of the connection or the server, not of the data."""
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


def _reason(error: BaseException, address: str) -> str:
    """Return the message of the server or its driver, on one line without secrets."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    original = cause.orig if isinstance(cause, DBAPIError) else cause
    return hide_secrets(summary_line(original or error), STORAGE_KEY, address)


class _Retry:
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


def _retried(
    method: "Callable[Concatenate[Any, P], R]",
) -> "Callable[Concatenate[Any, P], R]":
    """Wrap a method of `Database` so that it is retried after a lost connection."""

    def call(self: Any, /, *arguments: P.args, **keywords: P.kwargs) -> R:
        retry_seconds = 0.0 if self.is_lost else self.retry_seconds
        retry = _Retry(self.shown_address, retry_seconds)
        while True:
            try:
                result = method(self, *arguments, **keywords)
            except Exception as error:
                if not is_connection_error(error):
                    raise
                reason = _reason(error, self.address)
                if retry.is_exhausted(reason):
                    self.is_lost = True
                    message = f"{STORAGE_KEY}: {self.shown_address} stays out of reach ({reason})"
                    raise StorageLost(message) from None
            else:
                self.is_lost = False
                retry.succeed()
                return result
            retry.pause()

    functools.update_wrapper(call, method)
    return call


def _retry_transactions(cls: Storage) -> Storage:
    """Wrap all methods of Optuna's storage that run one transaction each."""
    for name in RDB_CALLS:
        setattr(cls, name, _retried(getattr(RDBStorage, name)))
    return cls


@_retry_transactions
class Database(RDBStorage):
    """Optuna's database storage, with calls that are retried after a lost connection.

    Args:
        url: the address with its driver.
        address: the address as the user gave it. Messages hide its secrets.
        retry_seconds: seconds for which a call is retried. After a call whose retries were in
            vain, each further call is tried once, until one succeeds: otherwise each of a worker's
            trials would wait as long again.
    """

    def __init__(
        self,
        url: "URL",
        address: str,
        retry_seconds: float,
    ) -> None:
        self.address = address
        self.shown_address = show_address(STORAGE_KEY, address)
        self.retry_seconds = retry_seconds
        self.is_lost = False
        engine_arguments = {
            # A pooled connection is tried before each use, as the server may have closed it.
            "pool_pre_ping": True,
            "connect_args": _connection_arguments(url),
        }
        super().__init__(
            url.render_as_string(hide_password=False), engine_kwargs=engine_arguments
        )

    def set_trial_state_values(
        self,
        trial_id: int,
        state: TrialState,
        values: Sequence[float] | None = None,
    ) -> bool:
        """Begin or finish a trial, once, even if the call is repeated after a lost connection."""
        if state == TrialState.RUNNING:
            # The token is drawn outside of the retried call: each attempt has the same one.
            return self._claim(trial_id, uuid.uuid4().hex)
        try:
            return self._finish(trial_id, state, values)
        except UpdateFinishedTrialError:
            # An attempt before this one may have been committed before its connection was lost.
            trial = self.get_trial(trial_id)
            expected_values = None if values is None else list(values)
            if trial.state != state or trial.values != expected_values:
                raise
            return True

    _finish = _retried(RDBStorage.set_trial_state_values)

    @_retried
    def _claim(self, trial_id: int, token: str) -> bool:
        """Begin a waiting trial, unless another call than this one already has."""
        return claim_waiting_trial(self, trial_id, CLAIM, token)

    def _get_prepared_new_trial(
        self,
        study_id: int,
        template_trial: FrozenTrial | None,
        session: "Session",
    ) -> Any:
        """Add a trial, unless the study has one of the template's number.

        An earlier attempt may have added it, or another machine. Optuna calls this method
        (`optuna/storages/_rdb/storage.py`, 5.0.0) with the study's row locked.
        """
        if template_trial is not None and template_trial.number >= 0:
            row = trial_row(session, study_id, template_trial.number)
            if row is not None:
                return row
        return super()._get_prepared_new_trial(study_id, template_trial, session)


def _connection_arguments(url: "URL") -> dict[str, int]:
    """Return the arguments for libpq that the address itself does not set."""
    is_postgresql = url.get_backend_name() == "postgresql"
    if not is_postgresql or url.get_driver_name() not in ("psycopg", "psycopg2"):
        return {}
    return {name: value for name, value in CONNECTION.items() if name not in url.query}
