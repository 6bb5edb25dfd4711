"""Runs the user's `notify.command`, which tells of the end of a run or of a study.

Whatever the command does, the run or the study goes on: a failure is one warning.
"""

import contextlib
import logging
import os
import shlex
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import IO, Literal

from finetune.config.sections.notify import NotifySettings
from finetune.errors import join_lines

log = logging.getLogger(__name__)

Event = Literal["completed", "failed", "interrupted", "stalled"]

OUTPUT_BYTES = 10_000
"""So much of the end of the command's output is logged."""


def notify(
    settings: NotifySettings, event: Event, name: str, answer: Path, message: str
) -> None:
    """Run the command, if there is one, and log its output.

    Args:
        settings: the command, and how long it may take.
        event: what has happened.
        name: the name of the run or of the study.
        answer: `result.json` of the run, or `answer.json` of the study, which need not exist.
        message: what has happened, in one line.
    """
    if not settings.command:
        return
    variables = {
        "FINETUNE_EVENT": event,
        "FINETUNE_NAME": name,
        "FINETUNE_MESSAGE": join_lines(message),
        "FINETUNE_ANSWER": str(answer.absolute()),
    }
    try:
        problem = _run(settings, variables)
    # The program is missing, or is none; or an argument is one that the system does not take.
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
    if problem:
        command = shlex.join(settings.command)
        log.warning("notify.command=%s: %s (event %s)", command, problem, event)


def _run(settings: NotifySettings, variables: dict[str, str]) -> str | None:
    """Run the command; return what went wrong."""
    # A file, not a pipe: a process that the command leaves behind may hold it open for long.
    with _output_file() as output:
        process = subprocess.Popen(
            settings.command,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Ctrl-C on the terminal is for the run. What hangs is ended with its children.
            start_new_session=True,
        )
        problem = None
        try:
            code = process.wait(settings.timeout)
            if code > 0:
                problem = f"ended with exit code {code}"
            elif code < 0:
                problem = f"killed by {signal.Signals(-code).name}"
        except subprocess.TimeoutExpired:
            problem = f"not ended after {settings.timeout:g} s (notify.timeout)"
        finally:
            if process.poll() is None:
                _kill(process)
        _log_output(output)
    return problem


def _output_file() -> IO[bytes]:
    """Return a file for the command's output, which is lost where no disk has room for it."""
    try:
        return tempfile.TemporaryFile()
    except OSError:
        return open(os.devnull, "w+b")


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _log_output(output: IO[bytes]) -> None:
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - OUTPUT_BYTES))
    for line in output.read().decode(errors="replace").splitlines():
        log.info("notify.command: %s", line)
