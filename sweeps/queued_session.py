"""What a job of a queue runs: a session of a study, by the command that queued it.

submitit pickles it into a file, and starts it in the job. Before a job loses its place (its time is
over, or Slurm preempts it), its trials write checkpoints; then it goes back into the queue, and
begins there again as a session that resumes the study.
"""

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydra.core.plugins import Plugins

from finetune.__main__ import resume, task
from finetune.app import run_app
from finetune.console import error_line, exit_code, quiet_libraries
from finetune.errors import Interrupted
from finetune.interrupt_signals import raised_interrupts
from sweeps.study.queued_notification import QueuedStudy

if TYPE_CHECKING:
    from hydra.plugins.sweeper import Sweeper
    from submitit.helpers import DelayedSubmission


@dataclass(frozen=True)
class QueuedSession:
    """A session of a study in a job of its own."""

    words: list[str]
    """The command line."""
    sweeper: "type[Sweeper]"
    """The class that the words name as `hydra.sweeper._target_`."""
    working_directory: str
    gpus: str | None
    """CUDA_VISIBLE_DEVICES of the command that queued it, for a job on the same machine."""
    study: QueuedStudy

    def __call__(self) -> None:
        """Run the session to its end.

        Raises:
            Exception: what ended it; its line is in the job's log, and in `outcome.json`.
        """
        # By submitit: back into the queue, with what `checkpoint` returns.
        requeue: Any = signal.getsignal(signal.SIGUSR2)
        is_called_back = False

        def end_session(number: int, frame: object) -> None:
            nonlocal is_called_back
            is_called_back = True
            os.kill(os.getpid(), signal.SIGTERM)

        signal.signal(signal.SIGUSR2, end_session)
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            with raised_interrupts() as raised:
                self._run()
        except (Exception, KeyboardInterrupt) as raised_error:
            is_replaced = raised.explain(raised_error)
            error = KeyboardInterrupt() if is_replaced else raised_error
            is_interrupted = isinstance(error, KeyboardInterrupt | Interrupted)
            if is_interrupted and is_called_back:
                requeue(signal.SIGUSR2, None)
            # Not after a lost database: nobody would end the job.
            is_asked = is_interrupted and getattr(error, "by_user", True)
            if is_asked and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
                if not _begins_again():
                    self._end(error)
                _await_kill()
            self._end(error)
            raise error from None
        self._end(None)

    def checkpoint(self) -> "DelayedSubmission":
        """Return what the job runs when it begins again: the same, which resumes the study."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _run(self) -> None:
        # submitit shows its local jobs the first GPUs by number, or none.
        if os.environ.get("SUBMITIT_EXECUTOR") == "local":
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
            if self.gpus is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = self.gpus
        os.chdir(self.working_directory)
        quiet_libraries(bars=False)
        Plugins.instance().register(self.sweeper)
        sys.argv[:] = ["finetune", *self.words]
        run_app(task, resume)

    def _end(self, error: BaseException | None) -> None:
        """Record the job's outcome next to its log, for the command that waits for it, and tell."""
        from submitit import JobEnvironment

        line = None if error is None else error_line(error)
        code = 0 if error is None else exit_code(error)
        if line is not None:
            print(f"error: {line}", file=sys.stderr)
        job = JobEnvironment()
        self.study.end_job(Path(job.paths.folder), job.job_id, code, line)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _begins_again() -> bool:
    """Return whether Slurm, which ends this job by SIGTERM, begins it again.

    It does after a preemption, and has counted that start already; after scancel it does not.
    """
    from submitit import JobEnvironment

    command = ["scontrol", "--oneliner", "show", "job", JobEnvironment().job_id]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return True
    starts = re.search(r"\bRestarts=(\d+)", asked.stdout)
    earlier_starts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return starts is None or int(starts[1]) > earlier_starts


def _await_kill() -> None:
    """Wait for the end that Slurm has announced by SIGTERM.

    A job that ends by itself would count as done. Slurm kills this one, and begins it again where
    it was preempted, or ends it where a user has cancelled it.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        signal.pause()
