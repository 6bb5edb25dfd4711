"""The processes that joblib starts for workers: they end with their sweep command.

joblib ends them when they have had no job for some time. But they ask for a lock of its before they
end, which nobody releases any more if the command was killed while it started processes. Read in
joblib 1.6.0, `joblib/externals/loky/process_executor.py:_process_worker`.
"""

import os
import threading
import time
from typing import Any

from sweeps.study.sweeper_process import SweeperProcess

CHECK_SECONDS = 2
"""How often a process looks whether its command lives."""

working = threading.Lock()
"""Held while this process runs a worker, which ends by itself if its command was killed."""


def end_with_command(launcher: Any, sweeper: SweeperProcess) -> None:
    """Let the processes of a joblib launcher end once the sweep command was killed.

    Args:
        launcher: Hydra's `JoblibLauncher`; it gives joblib what its attribute `joblib` holds.
        sweeper: the sweep command's process.
    """
    launcher.joblib.update(initializer=_watch_command, initargs=(sweeper,))


def _watch_command(sweeper: SweeperProcess) -> None:
    """End this process once the sweep command was killed, but no worker that it runs."""

    def watch() -> None:
        while not sweeper.is_dead:
            time.sleep(CHECK_SECONDS)
        with working:
            os._exit(1)

    threading.Thread(
        target=watch, name="watches the sweep command", daemon=True
    ).start()
