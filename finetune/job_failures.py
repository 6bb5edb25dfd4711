"""Errors of the jobs of a Hydra application: collected, and raised when all jobs have ended."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from finetune.console import error_line, exit_code
from finetune.errors import ConfigError, Interrupted, NoAnswer
from finetune.exit_codes import NO_ANSWER
from finetune.files.run_folder import discard_multirun

log = logging.getLogger(__name__)


Task = Callable[[DictConfig], object]
"""Trains the run of a composed config."""


@dataclass(frozen=True)
class JobFailures:
    """Errors of the jobs that ran in this process.

    They are collected, because Hydra prints several lines for an error, and ends a sweep at its
    first one.
    """

    errors: list[tuple[int | None, BaseException]] = field(default_factory=list)
    """The number of the job in its sweep (None: a single run), and its error."""

    sweep_folders: set[Path] = field(default_factory=set)
    """Folders of the sweeps in which a job failed."""

    def collect(self, task: Task) -> Task:
        """Return a task that does the same, and adds its error here instead of raising it."""

        def run_job(composed: DictConfig) -> object:
            # The job may run in another process: its error comes back through Hydra.
            if _launcher_reports_errors():
                return task(composed)
            try:
                return task(composed)
            except (Exception, KeyboardInterrupt) as error:
                is_interrupt = isinstance(error, KeyboardInterrupt | Interrupted)
                # It ends the whole sweep; any other error only its job.
                if is_interrupt and _is_multirun():
                    raise
                self._add(error)
                return None

        return run_job

    def discard_empty_sweeps(self) -> None:
        """Remove the folders of sweeps in which no job began."""
        for folder in self.sweep_folders:
            discard_multirun(folder)

    def raise_first(self) -> None:
        """Raise the first error, for a sweep with the number of its job and of all that failed."""
        if not self.errors:
            return
        job, error = self.errors[0]
        if job is None:
            raise error
        by_job = {job: error for job, error in self.errors if job is not None}
        raise sweep_error(by_job)

    def _add(self, error: BaseException) -> None:
        if not _is_multirun():
            self.errors.append((None, error))
            return
        number = HydraConfig.get().job.num
        log.error("job %s failed: %s", number, error_line(error))
        self.errors.append((number, error))
        self.sweep_folders.add(Path(HydraConfig.get().sweep.dir))


def sweep_error(errors: Mapping[int, BaseException]) -> ConfigError:
    """Return the error of a sweep with failed jobs, with the line of the first of them.

    Args:
        errors: the failed jobs' errors by their numbers.
    """
    first = min(errors)
    line = f"{len(errors)} failed; job {first}: {error_line(errors[first])}"
    codes = {exit_code(error) for error in errors.values()}
    # A single mistake in the input is one of the command.
    return NoAnswer(line) if codes == {NO_ANSWER} else ConfigError(line)


def _is_multirun() -> bool:
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def _launcher_reports_errors() -> bool:
    """Whether the current job belongs to a sweep whose launcher reports its jobs' errors itself.

    Hydra's basic launcher does not.
    """
    launcher = str(HydraConfig.get().launcher.get("_target_"))
    return _is_multirun() and "BasicLauncher" not in launcher
