"""The processes that joblib starts for workers: they end with their sweep command.

joblib ends a process that has had no job for some time. Before that the process takes a lock, which
stays locked if the command was killed while it started processes. Read in joblib 1.6.0,
`joblib/externals/loky/process_executor.py:_process_worker`.
"""

import os
import threading
import time
from typing import Any

from sweeps.study.sweeper_process import SweeperProcess

CHECK_SECONDS = 2
"""How often a process looks whether its command lives."""

IDLE_SECONDS = 10
"""Seconds after which a process without a job ends, and gives the memory of its base back."""

working = threading.Lock()
"""Held while this process runs a worker, which ends by itself if its command was killed."""


def end_with_command(launcher: Any, sweeper: SweeperProcess) -> None:
    """Let the processes of a joblib launcher end once the sweep command was killed.

    Args:
        launcher: Hydra's `JoblibLauncher`; it gives joblib what its attribute `joblib` holds.
        sweeper: the sweep command's process.
    """
    settings = launcher.joblib
    settings.update(initializer=_watch_command, initargs=(sweeper,))
    # Its other backend has no such setting.
    if settings.get("backend") == "loky":
        settings.setdefault("idle_worker_timeout", IDLE_SECONDS)


def _watch_command(sweeper: SweeperProcess) -> None:
    """End this process once the sweep command was killed and no worker runs in it."""

    def watch() -> None:
        while not sweeper.is_dead:
            time.sleep(CHECK_SECONDS)
        with working:
            os._exit(1)

    threading.Thread(
        target=watch, name="watches the sweep command", daemon=True
    ).start()
