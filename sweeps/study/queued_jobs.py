"""The jobs of a study's last queued session, in a file of its folder.

They may wait in the queue for long, before the study has begun.
"""

import logging
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune.files.atomic import read_json, write_json
from finetune.quantities import counted

log = logging.getLogger(__name__)

QUEUED = "queued.json"
"""The file."""

OUTCOME = "outcome.json"
"""The exit code and the error of a job, in the folder of its log."""


def write_queued(folder: Path, queue: str, jobs: Mapping[str, Path]) -> None:
    """Write the jobs that were queued.

    Args:
        folder: the study's folder.
        queue: the queue, as submitit names it: `slurm` or `local`.
        jobs: the jobs' numbers, or those of the processes, with the folders of their logs.
    """
    logs = [str(path) for path in jobs.values()]
    write_json(folder / QUEUED, {"queue": queue, "jobs": list(jobs), "logs": logs})


def queued_logs(folder: Path) -> dict[str, Path]:
    """Return the jobs that were queued last, as `write_queued` takes them.

    There are none while they are being queued.
    """
    entry = read_json(folder / QUEUED) or {"jobs": []}
    # The version before this one wrote no logs.
    logs = map(Path, entry.get("logs", ()))
    return dict(zip(entry["jobs"], logs, strict=False))


def describe_jobs(queue: str, numbers: Sequence[str]) -> str:
    """Return jobs as text: `2 Slurm jobs 12_0, 12_1`."""
    kind = "Slurm job" if queue == "slurm" else "process"
    count = counted(len(numbers), kind) if queue == "slurm" else kind
    return f"{count} {', '.join(numbers)}"


def describe_queued(folder: Path) -> str | None:
    """Return the queued jobs of a folder in which no study has begun; None: there are none."""
    entry = read_json(folder / QUEUED)
    if entry is None:
        return None
    for number, logs in queued_logs(folder).items():
        outcome = read_json(logs / OUTCOME) or {}
        if outcome.get("error"):
            job = describe_jobs(entry["queue"], [number])
            return f"has not begun, because of an error ({job}): {outcome['error']}"
    jobs = describe_jobs(entry["queue"], entry["jobs"])
    return f"no job of it has begun yet ({jobs})"


def numbers_in_queue(numbers: set[str]) -> set[str]:
    """Return those of some jobs that Slurm has in its queue: all while it can't be asked."""
    # Not sacct, which clusters without an accounting database have not.
    command = [
        "squeue",
        "--noheader",
        "--array",
        "--format=%i",
        f"--user={os.getuid()}",
    ]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        log.debug("squeue: %s", asked.stderr.strip())
        return numbers
    # An array's only job has the array's number where it was submitted alone.
    return numbers & set(asked.stdout.split())
