"""A journal or an SQLite file on a network file system is written by one host only.

Locks between hosts hold on some network file systems, are ignored by others, and nothing shows
which. So the host that writes leaves a record beside the file and renews it; another host that sees
the record renewed refuses to write. A record that is renewed no more is taken over: a preempted job
goes on, on another node.
"""

import socket
import threading
import time
import uuid
import weakref
from pathlib import Path

from finetune.config.secrets import STORAGE_KEY
from finetune.errors import ConfigError, refusal
from finetune.files.atomic import read_json, write_json

RENEW_SECONDS = 10.0
"""Seconds between two renewals of the record."""

WATCHED_RENEWALS = 3
"""For how many renewals another host's record is watched."""

NETWORK_FILE_SYSTEMS = (
    "nfs",
    "cifs",
    "smb",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "gluster",
    "afs",
    "panfs",
    "wekafs",
    "pvfs2",
    "fuse.",
)
"""Beginnings of the types of file systems that several hosts may have mounted."""


def file_system_type(path: Path) -> str:
    """Return the type of the file system of a file, as `ext4` or `nfs4`; empty: unknown."""
    import psutil

    resolved = path.resolve()
    longest, kind = -1, ""
    for mount in psutil.disk_partitions(all=True):
        point = Path(mount.mountpoint)
        # The last of several mounts at one point is the visible one.
        if resolved.is_relative_to(point) and len(point.parts) >= longest:
            longest, kind = len(point.parts), mount.fstype
    return kind


def this_host() -> dict[str, str]:
    """Return this host's name, and what tells it from another one of that name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    # Containers of one machine share its kernel, whose locks hold between them.
    kernel = boot.read_text().strip() if boot.exists() else str(uuid.getnode())
    return {"host": socket.gethostname(), "kernel": kernel}


class Hold:
    """The right of this host to write to a file, as long as the object lives.

    On a local file system every process has it.

    Args:
        file: the journal or database; the record is beside it.

    Raises:
        ConfigError: another host writes to the file.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._kind = file_system_type(file)
        self._is_lost = threading.Event()
        if not self._kind.startswith(NETWORK_FILE_SYSTEMS):
            return
        record = file.with_name(file.name + ".host")
        self._take(record)
        is_over = threading.Event()
        renewal = threading.Thread(
            target=_renew, args=(record, is_over, self._is_lost), daemon=True
        )
        renewal.start()
        weakref.finalize(self, is_over.set)

    def require(self) -> None:
        """Raise ConfigError if another host has taken over, as after a suspension of this one."""
        if self._is_lost.is_set():
            raise self._refusal("another host")

    def _take(self, record: Path) -> None:
        written = read_json(record)
        if _is_this_host(written):
            return
        if written is not None:
            self._refuse_renewed(record, written["host"])
        write_json(record, this_host())
        # Of hosts that begin together, the one that wrote last has it.
        time.sleep(RENEW_SECONDS / 10)
        written = read_json(record)
        if not _is_this_host(written):
            raise self._refusal(written["host"] if written else "another host")

    def _refuse_renewed(self, record: Path, host: str) -> None:
        # By changes instead of ages: the clocks of two hosts differ. By looks instead of a span of
        # time, in which this process may have been stopped.
        before = record.stat().st_mtime_ns
        for _ in range(10 * WATCHED_RENEWALS):
            time.sleep(RENEW_SECONDS / 10)
            if record.stat().st_mtime_ns != before:
                raise self._refusal(host)

    def _refusal(self, host: str) -> ConfigError:
        reason = (
            f"{self._file} is on a network file system ({self._kind}), and {host} writes to it; "
            "several hosts need a database: postgresql://user@host/db"
        )
        is_journal = self._file.suffix == ".journal"
        written = None if is_journal else f"sqlite:///{self._file}"
        return refusal(STORAGE_KEY, written, reason)


def _is_this_host(written: dict[str, str] | None) -> bool:
    """Whether a record is this host's, of whichever container."""
    return written is not None and written["kernel"] == this_host()["kernel"]


def _renew(record: Path, is_over: threading.Event, is_lost: threading.Event) -> None:
    failures = 0
    while not is_over.wait(RENEW_SECONDS):
        try:
            if not _is_this_host(read_json(record)):
                is_lost.set()
                return
            record.touch()
            failures = 0
        except (OSError, ConfigError):
            # The file system is out of reach. After so long another host has taken over.
            failures += 1
            if failures == WATCHED_RENEWALS:
                is_lost.set()
                return
