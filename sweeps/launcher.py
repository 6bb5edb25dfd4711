"""The Hydra launcher `slots`, the default: jobs of a plain multirun train together on one base.

Registered as a plugin by the package's entry point, so Hydra imports it at every start: everything
heavy is imported when jobs begin.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher

from finetune.errors import refusal

if TYPE_CHECKING:
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig


class SlotsLauncher(Launcher):
    """Trains several jobs at once in this process.

    Args:
        slots: number of jobs that train at once; `auto`: as many as fit into memory.
        others: keys of other launchers, as `n_jobs`; refused.
    """

    def __init__(self, slots: int | str = "auto", **others: object) -> None:
        self._slots = slots
        self._others = others

    def setup(
        self,
        *,
        hydra_context: "HydraContext",
        task_function: "TaskFunction",
        config: "DictConfig",
    ) -> None:
        """Store Hydra's context and config. Jobs are runs; the task function is not called."""
        self._hydra_context = hydra_context
        self._config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> list[JobReturn]:
        """Run one job for each list of overrides. A failed job does not end the others.

        Args:
            job_overrides: the command line of each job.
            initial_job_idx: the first job's number.

        Returns:
            Each job's return.

        Raises:
            ConfigError: a job failed; raised when all have ended.
        """
        from sweeps.study.multirun import Multirun

        for key, value in self._others.items():
            allowed = "no such key; hydra.launcher.slots is how many jobs train at once"
            raise refusal(f"hydra.launcher.{key}", value, allowed)
        is_count = isinstance(self._slots, int) and self._slots >= 1
        if self._slots != "auto" and not is_count:
            allowed = "must be at least 1, or auto: by memory"
            raise refusal("hydra.launcher.slots", self._slots, allowed)
        multirun = Multirun(self._hydra_context, self._config, self._slots)
        return multirun.run(job_overrides, initial_job_idx)
