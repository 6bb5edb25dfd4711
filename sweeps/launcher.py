"""The Hydra launchers `slots`, the default (jobs of a plain multirun train together), and `slurm`.

Registered as a plugin by the package's entry point, so Hydra imports it at every start: everything
heavy is imported when jobs begin.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher

from finetune.errors import ConfigError, refusal

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


class SlurmLauncher(Launcher):
    """Runs the jobs of a plain multirun as Slurm jobs, by hydra-submitit-launcher.

    The jobs of a study are queued by its sweeper, which reads the keys; see `sweeps.study.queue`.

    Args:
        workers_per_job: number of workers in each job of a study.
        gpus_per_node: number of GPUs of a job; auto: one.
        keys: those of `hydra/launcher=submitit_slurm`.
    """

    def __init__(
        self, workers_per_job: int = 1, gpus_per_node: int | str = "auto", **keys: Any
    ) -> None:
        self._workers_per_job = workers_per_job
        gpus = 1 if gpus_per_node == "auto" else gpus_per_node
        self._keys = {**keys, "gpus_per_node": gpus or None}

    def setup(
        self,
        *,
        hydra_context: "HydraContext",
        task_function: "TaskFunction",
        config: "DictConfig",
    ) -> None:
        """Store Hydra's context and config, and the task."""
        self._arguments: dict[str, Any] = {
            "hydra_context": hydra_context,
            "task_function": task_function,
            "config": config,
        }

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run one Slurm job for each list of overrides. The arguments are those of Hydra.

        Raises:
            ConfigError: submitit is not installed.
        """
        if self._workers_per_job != 1:
            allowed = "must be 1 without hydra/sweeper=optuna: each job is one run"
            key = "hydra.launcher.workers_per_job"
            raise refusal(key, self._workers_per_job, allowed)
        try:
            from hydra_plugins.hydra_submitit_launcher.submitit_launcher import (
                SlurmLauncher as SubmititLauncher,
            )
        except ModuleNotFoundError:
            from sweeps.study.queue import MISSING_EXTRA

            raise ConfigError(f"hydra/launcher=slurm: {MISSING_EXTRA}") from None
        launcher = SubmititLauncher(**self._keys)
        launcher.setup(**self._arguments)
        returns: Sequence[JobReturn] = launcher.launch(job_overrides, initial_job_idx)
        return returns
