"""A study's database: a storage whose calls are retried after a lost connection.

A lost connection is no trial's failure: the call is retried, and `StorageLost` ends the worker
where the server stays out of reach. The commit of a call may have happened before its connection
was lost, so each write must be safe to repeat.
"""

import math
import re
import time
import uuid
from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from finetune.config.addresses import parse_address, show_address
from finetune.config.secrets import STORAGE_KEY
from sweeps.compat import (
    RDB_CALLS,
    add_waiting_trials,
    claim_waiting_trial,
    exchange_claim,
    heartbeat_silences,
    record_heartbeats,
    trial_row,
)
from sweeps.study.drivers import choose_driver
from sweeps.study.retry import Retry, is_connection_error, retried, server_message
from sweeps.study.trial_reads import TrialReads

if TYPE_CHECKING:
    from sqlalchemy.engine import URL
    from sqlalchemy.orm import Session

Storage = TypeVar("Storage", bound=type)

RETRY_SECONDS = 120.0
"""Seconds for which a call is retried while the server is out of reach."""

OPENING_RETRY_SECONDS = 30.0
"""The same while a database is opened, when no work could be lost yet."""

CONNECTION = {"connect_timeout": 10, "keepalives_idle": 30, "tcp_user_timeout": 60_000}
"""Arguments of libpq (s, s, ms), by which a server that was switched off is noticed in a minute."""

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
    retry = Retry(shown_address, min(seconds, OPENING_RETRY_SECONDS))
    while True:
        try:
            return Database(url, address, seconds)
        except Exception as error:
            reason = server_message(error, address)
            can_recover = is_connection_error(error) and not _REFUSED.search(reason)
            if not can_recover or retry.is_exhausted(reason):
                raise
        retry.pause()


def _retry_transactions(cls: Storage) -> Storage:
    """Wrap all methods of Optuna's storage that run one transaction each."""
    for name in RDB_CALLS:
        setattr(cls, name, retried(getattr(cls, name)))
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
        self.longest_gap = math.inf
        """Seconds between two calls, after which the connection counts as interrupted."""
        self._connected_since = self._last_call = time.monotonic()
        self._reads: dict[int, TrialReads] = {}
        engine_arguments: dict[str, Any] = {
            # A pooled connection is tried before each use, as the server may have closed it.
            "pool_pre_ping": True,
            "connect_args": _connection_arguments(url),
        }
        if url.get_backend_name() != "sqlite":
            # A server has a hundred connections unless it is told otherwise, and each worker keeps
            # the pool's: one. A second one, for a heartbeat during a call, is closed after it.
            engine_arguments["pool_size"] = 1
        # SQLAlchemy writes a password as *** unless it is told otherwise.
        full_address = url.render_as_string(hide_password=False)
        super().__init__(full_address, engine_kwargs=engine_arguments)

    @property
    def is_file(self) -> bool:
        """Whether the database is a file of this machine."""
        return self.engine.url.get_backend_name() == "sqlite"

    def note_call(self) -> None:
        """Note that a call has succeeded."""
        now = time.monotonic()
        if now - self._last_call > self.longest_gap:
            self._connected_since = now
        self._last_call = now

    @property
    def connected_seconds(self) -> float:
        """Seconds for which calls have succeeded one after the other, up to the last one."""
        return self._last_call - self._connected_since

    def set_trial_state_values(
        self,
        trial_id: int,
        state: TrialState,
        values: Sequence[float] | None = None,
    ) -> bool:
        """Begin or finish a trial, once, even if the call is repeated after a lost connection."""
        if state == TrialState.RUNNING:
            # Drawn outside of the retried call: each attempt has the same one.
            return self.claim_trial(trial_id, uuid.uuid4().hex)
        try:
            return self._finish(trial_id, state, values)
        except UpdateFinishedTrialError:
            # An attempt before this one may have been committed before its connection was lost.
            trial = self.get_trial(trial_id)
            expected_values = None if values is None else list(values)
            if trial.state != state or trial.values != expected_values:
                raise
            return True

    _finish = retried(RDBStorage.set_trial_state_values)

    @retried
    def claim_trial(self, trial_id: int, claim: Any) -> bool:
        """Begin a waiting trial, unless another claim than this one already has."""
        return claim_waiting_trial(self, trial_id, claim)

    @retried
    def exchange_claim(
        self,
        trial_id: int,
        expected: Any,
        claim: Any,
        silent_seconds: float | None = None,
    ) -> bool:
        """Replace the claim of a running trial; arguments are those of `compat.exchange_claim`."""
        return exchange_claim(
            self,
            trial_id,
            expected,
            claim,
            silent_seconds,
        )

    add_waiting_trials = retried(add_waiting_trials)
    """Add waiting trials in one transaction, safe to repeat."""

    def record_heartbeats(self, claims: Mapping[int, Any]) -> set[int]:
        """Record that the holders of claims are alive; return the ids that they still hold.

        Tried once: the next heartbeat is the retry.
        """
        held = record_heartbeats(self, claims)
        self.note_call()
        return held

    held_claims = retried(record_heartbeats)
    """The same, retried after a lost connection."""

    @retried
    def heartbeat_silences(self, trial_ids: Sequence[int]) -> dict[int, float]:
        """Return for how many seconds trials have had no heartbeat."""
        return heartbeat_silences(self, trial_ids)

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        """Read what has changed of a study's trials, for Optuna's cache.

        Args:
            study_id: the storage's id of the study.
            states: the states to read; None: all.
            included_trial_ids: the trials that the cache has, and that have not ended.
            trial_id_greater_than: the last trial of the cache that has ended; -1: none.
        """
        reads = self._reads.setdefault(study_id, TrialReads(self, study_id))
        changed = reads.changed_ids(included_trial_ids)
        if changed is None or states is not None:
            trials = super()._get_trials(
                study_id, states, included_trial_ids, trial_id_greater_than
            )
        elif changed:
            # Optuna also reads all after an id: the waiting ones after the last changed one are
            # many, so it is the last id of all.
            last = max(reads.last_id, changed[-1])
            trials = super()._get_trials(study_id, None, set(changed), last)
        else:
            return []
        reads.note(trials)
        return trials

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
    arguments = {}
    for name, value in CONNECTION.items():
        if name not in url.query:
            arguments[name] = value
    return arguments
