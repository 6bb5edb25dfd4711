"""A study's storage: a journal file that survives kills, or a database shared by machines."""

import json
import os
import random
import re
import socket
import threading
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from optuna.storages import JournalStorage, get_storage
from optuna.storages.journal import JournalFileBackend

from finetune.config.addresses import EXAMPLE, hide_secrets, parse_address, show_address
from finetune.config.secrets import STORAGE_KEY
from finetune.console import summary_line
from finetune.errors import ConfigError, refusal
from finetune.files.lock import file_lock
from sweeps.study.one_host import Hold

if TYPE_CHECKING:
    from optuna.storages import BaseStorage


JOURNAL = "study.journal"
"""The journal's file in the study's folder."""

OPENING_ATTEMPTS = 10
"""How often to open an empty database while other machines create its tables."""

READ_BLOCK = 65536
"""Bytes read at a time from the end of the journal."""


def open_storage(
    address: str | None, folder: Path, retry_seconds: float | None = None
) -> "BaseStorage":
    """Open the journal in a study's folder, or the database at an address.

    Args:
        address: the database's address; None: the journal.
        folder: the study's folder.
        retry_seconds: seconds for which a lost connection is retried; None:
            `database.RETRY_SECONDS`.

    Returns:
        The storage.

    Raises:
        ConfigError: the storage can't be opened. The message hides the address's secrets.
    """
    if address is None:
        return JournalStorage(_Journal(folder / JOURNAL))
    from sweeps.study.database import open_database

    for attempt in range(OPENING_ATTEMPTS):
        try:
            return get_storage(open_database(address, retry_seconds))
        # It names the key already, and shows no secret.
        except ConfigError:
            raise
        except Exception as error:
            reason = hide_secrets(summary_line(error), STORAGE_KEY, address)
            is_last = attempt == OPENING_ATTEMPTS - 1
            if "already exists" not in reason or is_last:
                shown = show_address(STORAGE_KEY, address)
                raise ConfigError(
                    f"{STORAGE_KEY}: {shown} can't be opened ({reason})"
                ) from None
        # Another machine is creating the same tables. At random, or both would collide again.
        time.sleep(random.uniform(0.2, 1.0))
    raise AssertionError


def resolve_address(written: str | None) -> str | None:
    """Return a database's address with its environment variables.

    Args:
        written: the address as the user wrote it, which may refer to environment variables; None:
            the journal.

    Raises:
        ConfigError: a variable is not set on this machine.
    """
    try:
        address: str | None = OmegaConf.create({"storage": written}).storage
    except OmegaConfBaseException as error:
        allowed = f"must be set on {socket.gethostname()} too"
        reason = f"{allowed} ({summary_line(error)})"
        raise refusal(STORAGE_KEY, written, reason) from None
    return address


def check_address(address: str | None, workers: int) -> None:
    """Check a database's address before a study begins.

    Args:
        address: the database's address; None: the journal.
        workers: number of workers that will use it.

    Raises:
        ConfigError: the address is none, has no driver, or names a database that would give one
            trial to several workers.
    """
    if address is None:
        return
    if re.fullmatch(r"[\w./-]*", address):
        allowed = (
            "must be null (a journal file in the study folder) or a database's address, "
            f"as {EXAMPLE}"
        )
        raise refusal(STORAGE_KEY, address, allowed)
    url = parse_address(STORAGE_KEY, address)
    # Measured with Optuna 5.0.0: of 40 trials that 8 workers claimed, 27 were different ones.
    if url.drivername.startswith("sqlite") and workers > 1:
        reason = (
            f"SQLite gives one trial to several of {workers} workers; "
            "use null (a journal file) or PostgreSQL"
        )
        raise refusal(STORAGE_KEY, show_address(STORAGE_KEY, address), reason)
    from sweeps.study.drivers import choose_driver

    choose_driver(url)


def hold_database_file(address: str | None) -> Hold | None:
    """Hold an SQLite file for this host; None: the database is none.

    Raises:
        ConfigError: another host writes to it, on a network file system.
    """
    if address is None:
        return None
    url = parse_address(STORAGE_KEY, address)
    is_file = url.drivername.startswith("sqlite") and url.database not in (None, "")
    return Hold(Path(str(url.database))) if is_file else None


class _Journal(JournalFileBackend):
    """Optuna's journal file, repaired before each append, with a lock freed by its holder's death.

    A process killed while it writes, or a full disk, leaves an incomplete line. The next line would
    be appended to it, and the whole journal could not be read from then on.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        self._thread_lock = threading.Lock()
        self._hold: Hold | None = None

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append entries as whole lines, and wait until they are on the disk.

        Raises:
            ConfigError: another host appends to it, on a network file system.
        """
        # Readers need none.
        if self._hold is None:
            self._hold = Hold(self._path)
        self._hold.require()
        lines = []
        for log in logs:
            text = json.dumps(log, separators=(",", ":"))
            lines.append(text + "\n")
        entries = "".join(lines).encode()
        # Not Optuna's own lock, a symbolic link: a killed process leaves it behind, and the next
        # one waits 30 s before it breaks it.
        process_lock = file_lock(self._path.with_suffix(".lock"))
        # Opened for reading and writing, because appending could not cut an incomplete line off.
        with self._thread_lock, process_lock, open(self._path, "r+b") as file:
            file.seek(_end_of_last_line(file))
            file.truncate()
            file.write(entries)
            file.flush()
            os.fsync(file.fileno())


def _end_of_last_line(file: IO[bytes]) -> int:
    """Return the offset in bytes behind the last newline of a file."""
    size = file.seek(0, os.SEEK_END)
    # Backwards from the end: this happens at each append, and a journal grows with its study.
    position = size
    while position > 0:
        start = max(0, position - READ_BLOCK)
        file.seek(start)
        block = file.read(position - start)
        if position == size and block.endswith(b"\n"):
            return size
        if b"\n" in block:
            return start + block.rindex(b"\n") + 1
        position = start
    return 0
