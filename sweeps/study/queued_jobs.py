"""The jobs of a study's last queued session, in a file of its folder.

They may wait in the queue for long, before the study has begun.
"""

from collections.abc import Sequence
from pathlib import Path

from finetune.files.atomic import read_json, write_json
from finetune.quantities import counted

QUEUED = "queued.json"
"""The file."""


def write_queued(folder: Path, queue: str, numbers: Sequence[str]) -> None:
    """Write the jobs that were queued.

    Args:
        folder: the study's folder.
        queue: the queue, as submitit names it: `slurm` or `local`.
        numbers: the jobs' numbers, or those of the processes.
    """
    write_json(folder / QUEUED, {"queue": queue, "jobs": list(numbers)})


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
    jobs = describe_jobs(entry["queue"], entry["jobs"])
    return f"no job of it has begun yet ({jobs})"
