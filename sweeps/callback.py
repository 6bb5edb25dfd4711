"""The Hydra callback that ends every plain multirun with the table of its jobs.

Hydra imports it at every start: everything heavy is imported when the jobs have ended.
"""

import logging
import os
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback

from finetune.errors import ConfigError
from sweeps.study.find_study import is_plain_multirun

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)


class MultirunTable(Callback):
    """Prints the jobs of a plain multirun, the best first, whatever launcher ran them."""

    def on_multirun_end(self, config: "DictConfig", **_: Any) -> None:
        """Write the table into the multirun's folder, and print it.

        A search prints its answer instead, and a single job its summary.
        """
        folder = Path(config.hydra.sweep.dir)
        jobs = [path for path in folder.glob("trials/*") if path.name.isdigit()]
        if len(jobs) < 2 or not is_plain_multirun(folder):
            return
        from sweeps.study.multirun_folder import TABLE, write_table

        # Without an objective jobs can't be compared; then each has its own summary.
        with suppress(ConfigError):
            table = write_table(folder)
            path = os.path.relpath(folder)
            log.info("%s\ntable: %s", table, os.path.join(path, TABLE))
            log.info("charts: python -m sweeps report %s", shlex.quote(path))
