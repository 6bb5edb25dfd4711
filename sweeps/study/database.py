"""A study's database: the driver it is opened with, and a storage that outlives lost connections.

A lost connection is no trial's failure: a call that meets one is tried again, and where the server stays away
`StorageLost` ends the worker. Each write may be repeated, as its commit may have happened before the connection was
lost. The private names are those of Optuna 5's `optuna/storages/_rdb/storage.py`, which has no public way to do this.
"""

import functools
import importlib
import json
import logging
import random
import re
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import (
    DBAPIError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
    PendingRollbackError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from finetune.config.addresses import hide_secrets, parse_address, show_address
from finetune.console import summary_line
from finetune.errors import ConfigError
from sweeps.study.errors import KEY, StorageLost

if TYPE_CHECKING:
    from sqlalchemy.engine import URL
    from sqlalchemy.orm import Session


log = logging.getLogger(__name__)


P = ParamSpec("P")


R = TypeVar("R")


PATIENCE = 120.0
"""Seconds for which a call is tried again while the server is out of reach."""


OPENING_PATIENCE = 30.0
"""The same while a database is opened: nothing was computed yet that could be lost."""


LONGEST_PAUSE = 5.0
"""Seconds between two attempts, at most."""


CONNECTION = {"connect_timeout": 10, "keepalives_idle": 30, "tcp_user_timeout": 60_000}
"""Arguments of libpq: a server that was switched off is noticed within a minute, not after many."""


CLAIM = "claim"
"""The system attribute of a trial that names the call which began it."""


_REFUSED = re.compile(
    r"(?i)authentication failed|no password supplied|access denied|does not exist|unknown database"
    r"|could not translate host|name or service not known|unable to open database file"
)
"""What a server says of an address that is wrong: to try again would not help."""


class _Driver(NamedTuple):
    name: str
    module: str
    package: str


_POSTGRESQL = (
    _Driver("psycopg2", "psycopg2", "psycopg2-binary"),
    _Driver("psycopg", "psycopg", "psycopg[binary]"),
    _Driver("pg8000", "pg8000", "pg8000"),
)


_MYSQL = (
    _Driver("mysqldb", "MySQLdb", "mysqlclient"),
    _Driver("pymysql", "pymysql", "pymysql"),
    _Driver("mysqlconnector", "mysql.connector", "mysql-connector-python"),
)


DRIVERS = {"postgresql": _POSTGRESQL, "mysql": _MYSQL, "mariadb": _MYSQL}
"""The drivers that a database can be opened with; the first is the one to install."""


def choose_driver(url: "URL") -> "URL":
    """An address with an installed driver.

    The one that the address names, else SQLAlchemy's default, else another that is installed.

    Raises:
        ConfigError: there is none, or SQLAlchemy knows no such database.
    """
    backend = url.get_backend_name()
    drivers = DRIVERS.get(backend)
    try:
        default = url.get_driver_name()
    except NoSuchModuleError:
        raise ConfigError(f"{KEY}: {url.drivername} is no database; allowed: postgresql, mysql, sqlite") from None
    if drivers is None:
        return url
    is_named = "+" in url.drivername
    candidates = [driver for driver in drivers if driver.name == default or not is_named]
    if not candidates:
        names = ", ".join(f"{backend}+{driver.name}" for driver in drivers)
        raise ConfigError(f"{KEY}: {url.drivername} can't be used; allowed: {names}")
    candidates.sort(key=lambda driver: driver.name != default)
    for driver in candidates:
        if _is_installed(driver):
            return url.set(drivername=f"{backend}+{driver.name}")
    names = ", ".join(driver.name for driver in candidates)
    package = candidates[0].package if is_named else drivers[0].package
    raise ConfigError(f"{KEY}: no driver for {backend} is installed ({names}): pip install '{package}'")


def _is_installed(driver: _Driver) -> bool:
    try:
        importlib.import_module(driver.module)
    except ImportError:  # also where the driver lacks a library of the system
        return False
    return True


def open_database(address: str, patience: float | None) -> "Database":
    """Open a database, trying again while its server is out of reach. Raises what went wrong."""
    url = choose_driver(parse_address(KEY, address))
    waiting = PATIENCE if patience is None else patience
    attempts = _Attempts(show_address(KEY, address), min(waiting, OPENING_PATIENCE))
    while True:
        try:
            return Database(url, address, waiting)
        except Exception as error:
            reason = _reason(error, address)
            if not is_connection_error(error) or _REFUSED.search(reason) or attempts.are_over(reason):
                raise
        attempts.pause()


def is_connection_error(error: BaseException | None) -> bool:
    """Whether an error is the connection's or the server's, not that of the data."""
    if isinstance(error, StorageInternalError):
        error = error.__cause__
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    return isinstance(error, OperationalError | InterfaceError | PendingRollbackError | PoolTimeoutError)


def _reason(error: BaseException, address: str) -> str:
    """What the server or its driver said, on one line without secrets."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    said = cause.orig if isinstance(cause, DBAPIError) else cause
    return hide_secrets(summary_line(said or error), KEY, address)


class _Attempts:
    """One call's attempts while the server is out of reach."""

    def __init__(self, place: str, patience: float) -> None:
        self._place, self._patience = place, patience
        self._began: float | None = None
        self._pause = 0.1

    def are_over(self, reason: str) -> bool:
        """Count a failed attempt; whether it was the last."""
        now = time.monotonic()
        if self._began is None:
            self._began = now
            if self._patience > 0:
                log.warning("%s is out of reach (%s): trying again for %.0f s", self._place, reason, self._patience)
        return now - self._began >= self._patience

    def pause(self) -> None:
        """Wait before the next attempt, longer each time."""
        time.sleep(self._pause * random.uniform(0.5, 1.0))
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def succeed(self) -> None:
        """Say so, if the server was out of reach."""
        if self._began is not None and self._patience > 0:
            log.warning("%s is back after %.0f s", self._place, time.monotonic() - self._began)


def _retried(method: "Callable[Concatenate[Any, P], R]") -> "Callable[Concatenate[Any, P], R]":
    """A method of `Database` that is tried again when it meets a lost connection."""

    def call(self: Any, /, *arguments: P.args, **more: P.kwargs) -> R:
        attempts = _Attempts(self.place, 0.0 if self.is_lost else self.patience)
        while True:
            try:
                result = method(self, *arguments, **more)
            except Exception as error:
                if not is_connection_error(error):
                    raise
                reason = _reason(error, self.address)
                if attempts.are_over(reason):
                    self.is_lost = True
                    raise StorageLost(f"{KEY}: {self.place} stays out of reach ({reason})") from None
            else:
                self.is_lost = False
                attempts.succeed()
                return result
            attempts.pause()

    functools.update_wrapper(call, method)
    return call


class Database(RDBStorage):
    """Optuna's storage in a database, whose calls outlive lost connections.

    Args:
        url: the address with its driver.
        address: the address as it was given, whose secrets no message shows.
        patience: seconds for which a call is tried again. Once it was in vain, later calls are tried once,
            until one succeeds: each of a worker's trials would wait as long again otherwise.
    """

    def __init__(self, url: "URL", address: str, patience: float) -> None:
        self.place, self.address, self.patience, self.is_lost = show_address(KEY, address), address, patience, False
        uses_libpq = url.get_backend_name() == "postgresql" and url.get_driver_name() in ("psycopg", "psycopg2")
        arguments = {name: value for name, value in CONNECTION.items() if uses_libpq and name not in url.query}
        super().__init__(
            url.render_as_string(hide_password=False),
            engine_kwargs={"pool_pre_ping": True, "connect_args": arguments},
        )

    create_new_study = _retried(RDBStorage.create_new_study)
    delete_study = _retried(RDBStorage.delete_study)
    set_study_user_attr = _retried(RDBStorage.set_study_user_attr)
    set_study_system_attr = _retried(RDBStorage.set_study_system_attr)
    get_study_id_from_name = _retried(RDBStorage.get_study_id_from_name)
    get_study_name_from_id = _retried(RDBStorage.get_study_name_from_id)
    get_study_directions = _retried(RDBStorage.get_study_directions)
    get_study_user_attrs = _retried(RDBStorage.get_study_user_attrs)
    get_study_system_attrs = _retried(RDBStorage.get_study_system_attrs)
    get_all_studies = _retried(RDBStorage.get_all_studies)
    get_trial_id_from_study_id_trial_number = _retried(RDBStorage.get_trial_id_from_study_id_trial_number)
    get_trial = _retried(RDBStorage.get_trial)
    set_trial_intermediate_value = _retried(RDBStorage.set_trial_intermediate_value)
    set_trial_user_attr = _retried(RDBStorage.set_trial_user_attr)
    set_trial_system_attr = _retried(RDBStorage.set_trial_system_attr)
    _create_new_trial = _retried(RDBStorage._create_new_trial)
    _get_best_trial_id = _retried(RDBStorage._get_best_trial_id)
    _get_trials = _retried(RDBStorage._get_trials)
    _set_trial_param = _retried(RDBStorage._set_trial_param)
    _finish = _retried(RDBStorage.set_trial_state_values)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """Begin or end a trial; also where an attempt had done so before its connection was lost."""
        if state == TrialState.RUNNING:
            return self._begin(trial_id, uuid.uuid4().hex)
        try:
            return self._finish(trial_id, state, values)
        except UpdateFinishedTrialError:
            trial = self.get_trial(trial_id)
            if (trial.state, trial.values) != (state, None if values is None else list(values)):
                raise
            return True

    @_retried
    def _begin(self, trial_id: int, claim: str) -> bool:
        """Begin a waiting trial, unless another call than this one already has."""
        with _create_scoped_session(self.scoped_session) as session:
            trial: Any = models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)
            self.check_trial_is_updatable(trial_id, trial.state)
            kind = models.TrialSystemAttributeModel
            if trial.state != TrialState.WAITING:
                known: Any = kind.find_by_trial_and_key(trial, CLAIM, session)
                return known is not None and json.loads(known.value_json) == claim
            trial.state, trial.datetime_start = TrialState.RUNNING, datetime.now()
            self._set_trial_attr_without_commit(session, kind, trial_id, CLAIM, claim)
        return True

    def _get_prepared_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None, session: "Session"
    ) -> "models.TrialModel":
        """Add a trial, unless the study holds one of the template's number.

        An attempt before this one may have added it, or another machine. The study's row is locked here.
        """
        if template_trial is not None and template_trial.number >= 0:
            numbered = session.query(models.TrialModel).filter_by(study_id=study_id, number=template_trial.number)
            known = numbered.one_or_none()
            if known is not None:
                return known
        return super()._get_prepared_new_trial(study_id, template_trial, session)
