"""The process of a sweep command, as its workers in other processes know it.

Launchers start workers in different ways: as children of the command, as children of a process
between them (submitit), or by a daemon (Ray). So a worker does not ask for its parent, but whether
the command's process lives, where it can see that.
"""

import contextlib
import os
import socket
from dataclasses import dataclass, field

from sweeps.study.leases import MACHINE


def _process_table() -> str:
    """Return what names the processes that this one can see: machine and, in Linux, namespace."""
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{MACHINE}:{namespace}"


@dataclass(frozen=True)
class SweeperProcess:
    """The process that makes it; launchers pickle it for others."""

    pid: int = field(default_factory=os.getpid)
    process_table: str = field(default_factory=_process_table)
    host: str = field(default_factory=socket.gethostname)

    @property
    def is_this(self) -> bool:
        """Whether this process is the sweep command itself."""
        return self.pid == os.getpid() and self.process_table == _process_table()

    @property
    def is_dead(self) -> bool:
        """Whether it was on this machine, and has ended. Of other machines' it is not known."""
        if self.process_table != _process_table():
            return False
        import psutil

        try:
            # A process whose parent has not asked for its exit code is still in the table.
            return bool(psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True
