"""Start a session's workers through the chosen Hydra launcher, again if one was killed."""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from finetune.console import error_line
from finetune.errors import Interrupted
from sweeps.compat import end_joblib_workers, job_error
from sweeps.space.encoding import encode
from sweeps.space.settings import StudySettings
from sweeps.study.claims import orphaned_trials
from sweeps.study.errors import StorageLost
from sweeps.study.live_table import live_table
from sweeps.study.notification import stall_watch
from sweeps.study.session import Session
from sweeps.study.study import Study
from sweeps.study.worker import Worker

log = logging.getLogger(__name__)

RELAUNCHES = 25
"""How often to start the workers, as long as one of them is killed each time."""


def worker_count(settings: StudySettings) -> int:
    """Return the number of workers: `n_jobs`, or one for each visible GPU, or one on a CPU."""
    if settings.n_jobs is not None:
        return settings.n_jobs
    import torch

    return max(1, torch.cuda.device_count())


def run_workers(study: Study, session: Session) -> None:
    """Run a session's workers until no trial is left for them.

    Args:
        study: the study.
        session: the session.

    Raises:
        Interrupted: the user interrupted the workers, or they were killed too often.
        StorageLost: the database is out of reach.
        Exception: what a worker or the launcher raised.
    """
    workers = worker_count(session.settings)
    launcher = _make_launcher(session, workers)
    jobs = _worker_overrides(study, session, workers)
    resume = f"the same command with hydra.sweeper.study_name={study.name} goes on"
    for _ in range(RELAUNCHES):
        try:
            with (
                live_table(study),
                stall_watch(study, session.common.notify),
                _ends_workers_on_signals(session.stop_file, workers),
            ):
                returns = launcher.launch(jobs, initial_job_idx=0)
                if type(launcher).__name__ == "JoblibLauncher":
                    end_joblib_workers()
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted; {resume}") from None
        except Exception as error:
            # A launcher reports a killed process by an error of its own kind. A running trial
            # whose folder is not locked shows that it was that.
            if not orphaned_trials(study):
                raise
            log.warning(
                "a worker was lost (%s); its trial is taken on", error_line(error)
            )
            continue
        _raise_worker_error(returns, resume)
        # In a session that is over, trials without a worker wait for the next session.
        if not orphaned_trials(study) or session.is_over(study):
            return
    raise Interrupted(
        f"study {study.name}: workers were lost {RELAUNCHES} times; {resume}"
    )


def _worker_overrides(study: Study, session: Session, workers: int) -> list[list[str]]:
    """Return the overrides with which Hydra composes each worker's job."""
    sweep_dir = f"hydra.sweep.dir={encode(str(study.folder))}"
    jobs = []
    for index in range(workers):
        folders = [sweep_dir, f"hydra.sweep.subdir=workers/{index}"]
        jobs.append([*session.space.fixed_texts, *folders])
    return jobs


def _raise_worker_error(returns: Sequence[JobReturn], resume: str) -> None:
    """Raise the first worker's error; one that a user can mend says how to resume."""
    for job in returns:
        error = job_error(job)
        if isinstance(error, StorageLost):
            raise StorageLost(f"{error}; {resume}")
        if isinstance(error, Interrupted):
            raise Interrupted(f"interrupted; {resume}")
        if error is not None:
            raise error


def _make_launcher(session: Session, workers: int) -> Launcher:
    """Make the chosen launcher, with the workers as its jobs."""
    chosen = session.config.copy()
    # Where the user gave no name, the config's own `hydra.sweep.dir` lacks the study's name.
    with read_write(chosen), read_write(chosen.hydra):
        chosen.hydra.sweep.dir = str(session.folder)
    task = Worker(session)
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=session.hydra_context,
        task_function=task,
        config=_with_worker_launcher(chosen, workers),
    )
    # Jobs are composed again from this config, and must name the launcher that the user chose.
    launcher.setup(
        hydra_context=session.hydra_context, task_function=task, config=chosen
    )
    return launcher


def _with_worker_launcher(chosen: DictConfig, workers: int) -> DictConfig:
    """Replace a launcher that runs jobs in this process, and give joblib a process per worker.

    One worker runs in this process (`basic`), several in processes of their own (`joblib`).
    """
    config = chosen.copy()
    with read_write(config), read_write(config.hydra), open_dict(config.hydra):
        target = str(config.hydra.launcher._target_)
        # Hydra's basic launcher runs its jobs one after the other.
        if target.endswith(("BasicLauncher", "SlotsLauncher")):
            name = "joblib" if workers > 1 else "basic"
            stored = ConfigStore.instance().load(f"hydra/launcher/{name}.yaml")
            config.hydra.launcher = stored.node
        # Joblib starts as many processes as the machine has cores unless it is told otherwise.
        if str(config.hydra.launcher._target_).endswith("JoblibLauncher"):
            _log_other_processes(config.hydra.launcher.get("n_jobs"), workers)
            OmegaConf.update(config, "hydra.launcher.n_jobs", workers)
    return config


def _log_other_processes(n_jobs: int | None, workers: int) -> None:
    """Say that a study's workers decide the number of joblib's processes."""
    # Joblib's default is -1: as many as the machine has cores.
    if n_jobs not in (None, -1, workers):
        message = (
            "hydra.launcher.n_jobs=%s: %d instead, as hydra.sweeper.n_jobs decides"
        )
        log.warning(message, n_jobs, workers)


@contextlib.contextmanager
def _ends_workers_on_signals(stop_file: Path, workers: int) -> Iterator[None]:
    """On SIGINT or SIGTERM, ask workers in other processes to end; on a second one, end at once.

    A worker in this process receives the signals itself.

    Args:
        stop_file: the file that asks the workers to end; removed when they have.
        workers: number of workers.

    Raises:
        KeyboardInterrupt: when the workers have ended after a signal.
    """
    # Python lets only the main thread set signal handlers.
    is_main_thread = threading.current_thread() is threading.main_thread()
    if workers == 1 or not is_main_thread:
        yield
        return

    def request_stop(number: int, frame: object) -> None:
        if stop_file.exists():
            raise KeyboardInterrupt
        stop_file.touch()

    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, request_stop) for number in signals}
    try:
        yield
        if stop_file.exists():
            raise KeyboardInterrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        stop_file.unlink(missing_ok=True)
