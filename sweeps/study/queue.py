"""Sessions of a study as jobs of a queue: Slurm's, or local processes that submitit starts.

Each job is one allocation: it runs the study's command with the workers of that allocation, chooses
the engine where the GPUs are, and the last one to end writes the answer. The command that queued
the jobs loads no base, and may leave.
"""

import contextlib
import logging
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, read_write

from finetune.errors import ConfigError, Interrupted, NoAnswer, refusal
from finetune.exit_codes import INTERRUPTED, NO_ANSWER
from finetune.files.atomic import read_json
from sweeps.space.settings import StudySettings
from sweeps.study.queued_jobs import (
    OUTCOME,
    describe_jobs,
    numbers_in_queue,
    write_queued,
)

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0
"""Seconds between two looks at the queue."""

ABSENCES = 3
"""How often in a row a job must be missing in Slurm's queue to be lost: it may just begin again."""

MISSING_EXTRA = 'needs submitit: pip install "qlora-sweeps[submitit]"'

_NAMES = {
    "sweeps.launcher.SlurmLauncher": "slurm",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher": "slurm",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher": "local",
}
"""submitit's names of the queues, by launcher."""

MAX_RETURNS = 1000
"""How often a job that is out of time goes back into the queue, unless the launcher says it."""

_GENERIC = (
    "timeout_min",
    "cpus_per_task",
    "gpus_per_node",
    "tasks_per_node",
    "mem_gb",
    "nodes",
    "name",
    "stderr_to_stdout",
)
"""Keys that submitit has for every queue; the others get the queue's name as prefix."""


def queue_name(config: DictConfig, settings: StudySettings) -> str | None:
    """Return the queue into which a session's jobs go; None: its workers start from this process.

    Args:
        config: the sweep's config.
        settings: the session's settings.

    Raises:
        ConfigError: the session shall be detached, and its launcher has no queue.
    """
    launcher = str(config.hydra.launcher._target_)
    if launcher.startswith("sweeps.launcher.SlurmLauncher"):
        return "slurm"
    if not settings.detach:
        return None
    if launcher not in _NAMES:
        reason = (
            "only jobs of a queue go on alone: hydra/launcher=slurm, or submitit_local for "
            "processes of this machine; with Ray: ray job submit --no-wait -- python -m finetune …"
        )
        raise refusal("hydra.sweeper.detach", True, reason)
    return _NAMES[launcher]


def job_workers(
    config: DictConfig, settings: StudySettings, queue: str
) -> tuple[int, int | None]:
    """Return the number of jobs, and the number of workers in each; None: by its GPUs.

    Raises:
        ConfigError: the workers do not fill the jobs.
    """
    if queue == "local":
        return 1, settings.n_jobs
    workers = config.hydra.launcher.get("workers_per_job", 1)
    key = "hydra.launcher.workers_per_job"
    if not isinstance(workers, int) or workers < 1:
        raise refusal(key, workers, "must be at least 1")
    nodes = config.hydra.launcher.get("nodes")
    if nodes not in (None, 1):
        reason = "the workers of a job are on one node; hydra.sweeper.n_jobs gives further jobs"
        raise refusal("hydra.launcher.nodes", nodes, reason)
    total = settings.n_jobs or workers
    if total % workers:
        reason = f"hydra.sweeper.n_jobs={total} must be a multiple of it"
        raise refusal(key, workers, reason)
    return total // workers, workers


def submit(
    config: DictConfig,
    settings: StudySettings,
    folder: Path,
    queue: str,
    session: Callable[[], None],
    jobs: int,
) -> list[Any]:
    """Queue the jobs of a session.

    Args:
        config: the sweep's config.
        settings: the session's settings.
        folder: the study's folder.
        queue: the queue.
        session: what each job runs.
        jobs: number of jobs.

    Returns:
        submitit's jobs.

    Raises:
        ConfigError: submitit is not installed, there is no Slurm here, or it refuses the jobs.
    """
    try:
        import submitit
    except ModuleNotFoundError:
        raise ConfigError(f"hydra.launcher: {MISSING_EXTRA}") from None
    if queue == "slurm" and shutil.which("sbatch") is None:
        reason = "sbatch is not on this machine; use a login node of the cluster"
        raise ConfigError(f"hydra/launcher=slurm: {reason}")
    keys = _launcher_keys(config, folder)
    logs = keys.pop("submitit_folder")
    python = keys.pop("python", None) or shlex.quote(sys.executable)
    first = {f"{queue}_max_num_timeout": keys.pop("max_num_timeout", MAX_RETURNS)}
    if queue == "slurm":
        first["slurm_python"] = f"exec {python}"
    try:
        executor = submitit.AutoExecutor(folder=logs, cluster=queue, **first)
        executor.update_parameters(**_parameters(keys, settings, queue))
        with _survives_its_terminal(), executor.batch():
            queued = [executor.submit(session) for _ in range(jobs)]
    except (ValueError, TypeError, NameError, AssertionError) as error:
        raise ConfigError(f"hydra.launcher: {error}") from None
    except submitit.core.utils.FailedJobError as error:
        raise ConfigError(f"hydra/launcher=slurm: sbatch: {error}") from None
    write_queued(folder, queue, {job.job_id: job.paths.folder for job in queued})
    return queued


def _launcher_keys(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Return the launcher's keys, with the study's folder where they refer to it."""
    resolved = config.copy()
    with read_write(resolved), read_write(resolved.hydra):
        resolved.hydra.sweep.dir = str(folder)
    keys = OmegaConf.to_container(resolved.hydra.launcher, resolve=True)
    assert isinstance(keys, dict)
    del keys["_target_"]
    return {str(key): value for key, value in keys.items()}


def _parameters(
    keys: Mapping[str, Any], settings: StudySettings, queue: str
) -> dict[str, Any]:
    """Return submitit's parameters from the launcher's keys."""
    keys = dict(keys)
    workers = keys.pop("workers_per_job", 1)
    if keys.get("gpus_per_node") == "auto":
        asks = any(keys.get(key) for key in ("gres", "gpus_per_task"))
        keys["gpus_per_node"] = None if asks else workers * settings.gpus_per_worker
    if queue == "slurm":
        # Python is the batch script's only process, which gets Slurm's signals itself: srun ends
        # its tasks at once when a job is preempted, before they have written checkpoints.
        keys["use_srun"] = False
        keys["additional_parameters"] = {
            "signal": f"B:USR2@{keys['signal_delay_s']}",
            # Slurm begins a preempted job again, and one whose node has failed.
            "requeue": True,
            **(keys.get("additional_parameters") or {}),
        }
    parameters = {}
    for key, value in keys.items():
        if value is None or (key == "gpus_per_node" and not value):
            continue
        parameters[key if key in _GENERIC else f"{queue}_{key}"] = value
    return parameters


@contextlib.contextmanager
def _survives_its_terminal() -> Iterator[None]:
    """Let the processes that start in the block live on when the terminal is closed."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, previous)


def await_jobs(jobs: Sequence[Any]) -> None:
    """Wait until Slurm jobs have ended; Ctrl-C and SIGTERM cancel them.

    Raises:
        Interrupted: they were cancelled, or lost.
        NoAnswer, ConfigError: a job's error, when all have ended.
    """
    try:
        lost = _await_ends(jobs)
    except KeyboardInterrupt:
        subprocess.run(["scancel", *(job.job_id for job in jobs)], check=False)
        raise Interrupted("interrupted; its jobs are cancelled") from None
    for job in jobs:
        outcome = read_json(job.paths.folder / OUTCOME) or {}
        if outcome.get("error"):
            line = f"job {job.job_id}: {outcome['error']}"
            if outcome["exit_code"] == INTERRUPTED:
                raise Interrupted(line)
            is_input = outcome["exit_code"] != NO_ANSWER
            raise ConfigError(line) if is_input else NoAnswer(line)
    if lost:
        raise Interrupted(f"cancelled or lost: {describe_jobs('slurm', lost)}")


def _await_ends(jobs: Sequence[Any]) -> list[str]:
    """Wait until jobs have written their results; return those that vanished without one."""
    absences = dict.fromkeys((job.job_id for job in jobs), 0)
    while True:
        waiting = [job for job in jobs if not job.paths.result_pickle.exists()]
        in_queue = numbers_in_queue({job.job_id for job in waiting})
        for job in waiting:
            is_absent = job.job_id not in in_queue
            absences[job.job_id] = absences[job.job_id] + 1 if is_absent else 0
        if all(absences[job.job_id] >= ABSENCES for job in waiting):
            return [job.job_id for job in waiting]
        time.sleep(POLL_SECONDS)
