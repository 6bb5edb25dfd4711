"""Where a study's trials are kept: a journal file that survives kills, or a database that several machines share."""

import json
import os
import random
import re
import threading
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from optuna.storages import JournalStorage, get_storage
from optuna.storages.journal import JournalFileBackend

from finetune.config.addresses import EXAMPLE, hide_secrets, parse_address, show_address
from finetune.console import summary_line
from finetune.errors import ConfigError, refusal
from finetune.files.lock import file_lock
from sweeps.study.errors import KEY

if TYPE_CHECKING:
    from optuna.storages import BaseStorage


JOURNAL = "study.journal"


OPENINGS = 10
"""How often an empty database is opened while other machines make its tables."""


def open_storage(address: str | None, folder: Path, patience: float | None = None) -> "BaseStorage":
    """A journal in the study's folder, or the database at an address.

    Args:
        address: the database's address; None: the journal.
        folder: the study's folder.
        patience: seconds for which a lost connection is tried again; None: `database.PATIENCE`.

    Raises:
        ConfigError: it can't be opened. Secrets of the address are not shown.
    """
    if address is None:
        return JournalStorage(_Journal(folder / JOURNAL))
    from sweeps.study.database import open_database

    for attempt in range(OPENINGS):
        try:
            return get_storage(open_database(address, patience))
        except ConfigError:
            raise
        except Exception as error:
            reason = hide_secrets(summary_line(error), KEY, address)
            if "already exists" not in reason or attempt == OPENINGS - 1:
                place = show_address(KEY, address)
                raise ConfigError(f"{KEY}: {place} can't be opened ({reason})") from None
        time.sleep(random.uniform(0.2, 1.0))  # another machine is making the tables just now
    raise AssertionError


def check_address(address: str | None, workers: int) -> None:
    """Refuse, before anything begins, an address that is none and a database that hands a trial out twice."""
    if address is None:
        return
    if re.fullmatch(r"[\w./-]*", address):
        allowed = f"must be null (a journal file in the study folder) or a database's address, as {EXAMPLE}"
        raise refusal(KEY, address, allowed)
    url = parse_address(KEY, address)
    if url.drivername.startswith("sqlite") and workers > 1:
        reason = f"SQLite gives one trial to several of {workers} workers; use null (a journal file) or PostgreSQL"
        raise refusal(KEY, show_address(KEY, address), reason)
    from sweeps.study.database import choose_driver

    choose_driver(url)


class _Journal(JournalFileBackend):
    """Optuna's journal file, with a lock that dies with its holder and a tail that is mended before each append.

    A process killed in mid-write, or a full disk, leaves half a line; the next line would be glued to it and
    the whole journal be unreadable from then on.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path, self._thread_lock = path, threading.Lock()

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with self._thread_lock, file_lock(self._path.with_suffix(".lock")), open(self._path, "r+b") as file:
            file.seek(_end_of_last_line(file))
            file.truncate()
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())


def _end_of_last_line(file: IO[bytes]) -> int:
    """Where the last whole line of a file ends."""
    end = position = file.seek(0, os.SEEK_END)
    while position > 0:
        start = max(0, position - 65536)
        file.seek(start)
        block = file.read(position - start)
        if position == end and block.endswith(b"\n"):
            return end
        if b"\n" in block:
            return start + block.rindex(b"\n") + 1
        position = start
    return 0
