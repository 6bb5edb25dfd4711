"""Run a session's workers through the chosen Hydra launcher."""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from finetune.errors import Interrupted
from sweeps.compat import end_joblib_workers, job_error
from sweeps.space.encoding import encode
from sweeps.study.errors import StorageLost
from sweeps.study.joblib_processes import end_with_command
from sweeps.study.live_table import live_table
from sweeps.study.notification import stall_watch
from sweeps.study.session import Session
from sweeps.study.study import Study
from sweeps.study.worker import Worker

log = logging.getLogger(__name__)


def launch(
    study: Study,
    session: Session,
    worker: Worker,
    count: int,
    in_processes: bool,
) -> Sequence[JobReturn]:
    """Run workers as jobs of the chosen launcher, until they have ended.

    Args:
        study: the study.
        session: the session.
        worker: what each job runs.
        count: number of workers.
        in_processes: whether each has a process of its own.

    Returns:
        What each worker has returned, or the error that ended it.

    Raises:
        Interrupted: the user interrupted the workers.
        Exception: the launcher's, as where a process was killed.
    """
    launcher = _make_launcher(session, worker, count, in_processes)
    jobs = _worker_overrides(study, session, count)
    signals: AbstractContextManager[None] = contextlib.nullcontext()
    if in_processes:
        signals = _ends_workers_on_signals(session.stop_file)
    try:
        watched = stall_watch(study, session.common.notify)
        with live_table(study), watched, signals:
            returns: Sequence[JobReturn] = launcher.launch(jobs, initial_job_idx=0)
            return returns
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {resume_hint(study)}") from None
    finally:
        # Idle processes would keep their bases in memory.
        if type(launcher).__name__ == "JoblibLauncher":
            end_joblib_workers()
        if type(launcher).__name__ == "RayLauncher":
            _leave_ray()


def raise_worker_error(study: Study, returns: Sequence[JobReturn]) -> None:
    """Raise the first worker's error; one that a user can mend says how to resume."""
    for job in returns:
        error = job_error(job)
        if isinstance(error, StorageLost):
            raise StorageLost(f"{error}; {resume_hint(study)}")
        if isinstance(error, Interrupted):
            raise Interrupted(f"interrupted; {resume_hint(study)}")
        if error is not None:
            raise error


def resume_hint(study: Study) -> str:
    """Return how a user goes on with a study."""
    return f"the same command with hydra.sweeper.study_name={study.name} goes on"


def _worker_overrides(study: Study, session: Session, workers: int) -> list[list[str]]:
    """Return the overrides with which Hydra composes each worker's job."""
    sweep_dir = f"hydra.sweep.dir={encode(str(study.folder))}"
    jobs = []
    for index in range(workers):
        folders = [sweep_dir, f"hydra.sweep.subdir=workers/{index}"]
        jobs.append([*session.space.fixed_texts, *folders])
    return jobs


def _make_launcher(
    session: Session,
    worker: Worker,
    count: int,
    in_processes: bool,
) -> Launcher:
    """Make the chosen launcher, with the workers as its jobs."""
    chosen = session.config.copy()
    # Where the user gave no name, the config's own `hydra.sweep.dir` lacks the study's name.
    with read_write(chosen), read_write(chosen.hydra):
        chosen.hydra.sweep.dir = str(session.folder)
    config = _with_worker_launcher(chosen, count, in_processes)
    if str(config.hydra.launcher._target_).endswith("RayLauncher"):
        _give_gpus(config, session)
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=session.hydra_context,
        task_function=worker,
        config=config,
    )
    if in_processes and type(launcher).__name__ == "JoblibLauncher":
        end_with_command(launcher, session.sweeper)
    # Jobs are composed again from this config, and must name the launcher that the user chose.
    launcher.setup(
        hydra_context=session.hydra_context, task_function=worker, config=chosen
    )
    return launcher


def _with_worker_launcher(
    chosen: DictConfig, workers: int, in_processes: bool
) -> DictConfig:
    """Replace a launcher that runs jobs in this process, and give joblib a process per worker."""
    config = chosen.copy()
    with read_write(config), read_write(config.hydra), open_dict(config.hydra):
        target = str(config.hydra.launcher._target_)
        # Hydra's basic launcher runs its jobs one after the other.
        if target.endswith(("BasicLauncher", "SlotsLauncher")):
            name = "joblib" if in_processes else "basic"
            stored = ConfigStore.instance().load(f"hydra/launcher/{name}.yaml")
            config.hydra.launcher = stored.node
        # Joblib starts as many processes as the machine has cores unless it is told otherwise.
        if str(config.hydra.launcher._target_).endswith("JoblibLauncher"):
            _log_other_processes(config.hydra.launcher.get("n_jobs"), workers)
            # With one process, joblib runs its jobs in the process that calls it.
            processes = max(workers, 2) if in_processes else workers
            OmegaConf.update(config, "hydra.launcher.n_jobs", processes)
    return config


def _give_gpus(config: DictConfig, session: Session) -> None:
    """Ask Ray for each worker's GPUs, unless the user has: it hides all GPUs from a task else."""
    remote = config.hydra.launcher.ray.remote
    if session.gpus and remote.get("num_gpus") is None:
        with read_write(config), read_write(config.hydra), open_dict(remote):
            remote.num_gpus = session.settings.gpus_per_worker


def _leave_ray() -> None:
    """End the local cluster of the launcher, or the connection to another one."""
    import ray

    ray.shutdown()


def _log_other_processes(n_jobs: int | None, workers: int) -> None:
    """Say that a study's workers decide the number of joblib's processes."""
    # Joblib's default is -1: as many as the machine has cores.
    if n_jobs not in (None, -1, workers):
        message = (
            "hydra.launcher.n_jobs=%s: %d instead, as hydra.sweeper.n_jobs decides"
        )
        log.warning(message, n_jobs, workers)


@contextlib.contextmanager
def _ends_workers_on_signals(stop_file: Path) -> Iterator[None]:
    """On SIGINT or SIGTERM, ask workers in other processes to end; on a second one, end at once.

    A worker in this process receives the signals itself.

    Args:
        stop_file: the file that asks the workers to end; removed when they have.

    Raises:
        KeyboardInterrupt: when the workers have ended after a signal.
    """
    # Python lets only the main thread set signal handlers.
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def request_stop(number: int, frame: object) -> None:
        if stop_file.exists():
            raise KeyboardInterrupt
        stop_file.touch()

    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, request_stop) for number in signals}
    try:
        try:
            yield
        except Exception:
            # The signal may have ended a worker too, which is not lost then.
            if not stop_file.exists():
                raise
        if stop_file.exists():
            raise KeyboardInterrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        stop_file.unlink(missing_ok=True)
