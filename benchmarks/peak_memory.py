"""The peak memory of a command.

On Linux a process inherits the peak of the one that starts it (`ru_maxrss` survives `exec`), so a
large parent hides what a command takes. A small process of its own starts it, therefore.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

MEASURE = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
with open(sys.argv[1], "w") as file:
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024, file=file)
sys.exit(code)
"""


def run_and_measure(
    command: Sequence[str],
    *,
    cwd: Path | None = None,
    stdout: IO[str] | None = None,
    stderr: IO[str] | int | None = None,
) -> tuple[int, int]:
    """Run a command.

    Returns:
        Its exit code, and the peak resident memory of its largest process in bytes.
    """
    with tempfile.NamedTemporaryFile("r") as peak:
        measure = [sys.executable, "-c", MEASURE, peak.name]
        process = subprocess.run(
            [*measure, *command], cwd=cwd, stdout=stdout, stderr=stderr, check=False
        )
        return process.returncode, int(peak.read())
