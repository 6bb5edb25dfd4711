"""Leases: which machine trains which trial of a study in a database.

A claim names its machine and folder, and stays valid as long as its worker writes heartbeats. Where
worker and folder are on this machine, the lock of the trial's folder says at once whether the
worker lives. Of other machines only the heartbeats do. A worker that can't write them gives its
trials up before another one may take them.
"""

import contextlib
import logging
import math
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from finetune.config.secrets import STORAGE_KEY
from sweeps.compat import CLAIM, database_of
from sweeps.study.errors import LeaseLost, StorageLost

if TYPE_CHECKING:
    from sweeps.study.database import Database

log = logging.getLogger(__name__)

LOST_AFTER = 300.0
"""Default of `hydra.sweeper.lost_after`, in seconds."""

HEARTBEATS = 12
"""Number of heartbeats in that time."""

GAP = 2
"""Heartbeats that fail before a connection counts as interrupted."""

WATCHED = 3
"""Heartbeats for which a worker watches the database before it takes a lost machine's trial: after
an interruption all workers that live have written one by then."""

GIVES_UP = 0.8
"""Share of that time after which a worker that can't write heartbeats gives its trials up."""

RELEASED = {"released": True}
"""The claim of a running trial that its worker has given back."""


def _machine() -> str:
    """Return what tells this machine from others. Laptops share names, images of disks ids."""
    machine_id = ""
    with contextlib.suppress(OSError):
        machine_id = Path("/etc/machine-id").read_text(encoding="utf-8").strip()
    return f"{socket.gethostname()}/{machine_id}"


MACHINE = _machine()


def open_leases(
    storage: BaseStorage, folder: Path, lost_after: float | None
) -> "Leases | None":
    """Return the leases of a study, or None where one machine has all its workers.

    Args:
        storage: the study's storage.
        folder: the study's folder.
        lost_after: seconds without a heartbeat after which others may take the trials of this
            process; None: the default.
    """
    database: Any = database_of(storage)
    if database is None or database.is_file:
        return None
    return Leases(database, folder, LOST_AFTER if lost_after is None else lost_after)


class Leases:
    """The trials that this process holds, and those of other machines that it may take.

    Args:
        database: the study's database.
        folder: the study's folder.
        seconds: seconds without a heartbeat after which others may take this process's trials.
    """

    def __init__(self, database: "Database", folder: Path, seconds: float) -> None:
        self._database = database
        self._folder = folder
        self._place = f"{MACHINE}:{folder}"
        self._seconds = seconds
        self._held: dict[int, Any] = {}
        # The heartbeats have a thread of their own.
        self._lock = threading.Lock()
        database.longest_gap = GAP * seconds / HEARTBEATS

    def claim(self, trial_id: int) -> bool:
        """Claim a waiting trial; return whether this process has it."""
        claim = self._new_claim()
        is_held = self._database.claim_trial(trial_id, claim)
        return self._hold(trial_id, claim, is_held)

    def free(self, trials: Mapping[int, FrozenTrial]) -> list[int]:
        """Return the ids of trials that this process may take, if their folders are unlocked.

        Args:
            trials: running trials by the storage's ids.
        """
        limits = {key: self._silence_limit(trial) for key, trial in trials.items()}
        elsewhere = [key for key, limit in limits.items() if limit is not None]
        silences = self._database.heartbeat_silences(elsewhere) if elsewhere else {}
        watched = self._database.connected_seconds * HEARTBEATS / WATCHED
        free = []
        for key, limit in limits.items():
            if limit is None or min(silences.get(key, math.inf), watched) > limit:
                free.append(key)
        return free

    def release_lost(self, trials: Mapping[int, FrozenTrial]) -> None:
        """Release the trials of lost machines, so that any worker may take them at once.

        A new worker would have to watch the database first.

        Args:
            trials: running trials by the storage's ids.
        """
        for trial_id in self.free(trials):
            trial = trials[trial_id]
            limit = self._silence_limit(trial)
            if limit is not None:
                self._database.exchange_claim(
                    trial_id,
                    expected=trial.system_attrs.get(CLAIM),
                    claim=RELEASED,
                    silent_seconds=limit,
                )

    def take(self, trial_id: int, trial: FrozenTrial) -> bool:
        """Take a running trial that is free; return whether this process has it."""
        claim = self._new_claim()
        is_held = self._database.exchange_claim(
            trial_id,
            expected=trial.system_attrs.get(CLAIM),
            claim=claim,
            silent_seconds=self._silence_limit(trial),
        )
        return self._hold(trial_id, claim, is_held)

    def _silence_limit(self, trial: FrozenTrial) -> float | None:
        """Return after how many seconds of silence a trial may be taken.

        None: at once, if its folder is not locked.
        """
        claim: Any = trial.system_attrs.get(CLAIM)
        has_folder = (self._folder / "trials" / str(trial.number)).exists()
        if claim == RELEASED:
            return None
        if not self.covers(trial):
            return None if has_folder else math.inf
        # Without the folder it is another machine, though of the same name.
        if claim["place"] == self._place and has_folder:
            return None
        return float(claim["seconds"])

    def covers(self, trial: FrozenTrial) -> bool:
        """Whether a running trial has a lease; one that an older version claimed has none."""
        return isinstance(trial.system_attrs.get(CLAIM), dict)

    def _new_claim(self) -> dict[str, Any]:
        token = uuid.uuid4().hex
        return {"token": token, "place": self._place, "seconds": self._seconds}

    def _hold(self, trial_id: int, claim: Any, is_held: bool) -> bool:
        if is_held:
            with self._lock:
                self._held[trial_id] = claim
        return is_held

    def release(self, trial_id: int) -> None:
        """Give a trial back, if it still runs and is held: another worker may take it at once."""
        with self._lock:
            claim = self._held.pop(trial_id, None)
        if claim is None:
            return
        # Out of reach: it is free when the lease has ended.
        with contextlib.suppress(StorageLost):
            self._database.exchange_claim(trial_id, expected=claim, claim=RELEASED)

    def require(self, trial_id: int) -> None:
        """Raise LeaseLost if another worker has taken a trial of this process."""
        with self._lock:
            claim = self._held.get(trial_id)
        if claim is None or not self._database.held_claims({trial_id: claim}):
            raise LeaseLost("another worker has taken it")

    def holds(self, trial_id: int) -> bool:
        """Whether the last heartbeat still found a trial held by this process."""
        with self._lock:
            return trial_id in self._held

    @contextlib.contextmanager
    def kept_alive(self, give_up: Callable[[StorageLost], None]) -> Iterator[None]:
        """Write heartbeats while the context lasts.

        Args:
            give_up: called from another thread when none could be written for so long that others
                may soon take the trials.
        """
        ended = threading.Event()
        arguments = (ended, give_up)
        thread = threading.Thread(target=self._beat, args=arguments, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _beat(
        self, ended: threading.Event, give_up: Callable[[StorageLost], None]
    ) -> None:
        last_success = time.monotonic()
        while not ended.wait(self._seconds / HEARTBEATS):
            with self._lock:
                claims = dict(self._held)
            began = time.monotonic()
            try:
                held = self._database.record_heartbeats(claims)
            # Whatever it is, the next one may succeed; if none does, the trials are given up.
            except Exception as error:
                silence = time.monotonic() - last_success
                log.debug("no heartbeat: %s", error)
                if silence > GIVES_UP * self._seconds:
                    shown = self._database.shown_address
                    reason = f"took no heartbeat for {silence:.0f} s"
                    # From here on each call is tried once: others would only delay the end.
                    self._database.is_lost = True
                    give_up(StorageLost(f"{STORAGE_KEY}: {shown} {reason}"))
                continue
            last_success = began
            with self._lock:
                for trial_id in claims.keys() - held:
                    self._held.pop(trial_id, None)
