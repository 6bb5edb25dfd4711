"""The processes that joblib starts for workers, when the sweep command is killed."""

import time
import uuid
from pathlib import Path

import pytest
from support.commands import Station
from support.configs import study_overrides
from support.faults import MARK, marked_processes

KILLED_AT_START = """
import os, signal
from joblib.externals.loky.process_executor import ProcessPoolExecutor
start_processes = ProcessPoolExecutor._adjust_process_count
def start_and_die(executor):
    start_processes(executor)
    os.kill(os.getpid(), signal.SIGKILL)
ProcessPoolExecutor._adjust_process_count = start_and_die
"""
"""Kills the command when joblib has started its processes and given them no job: it holds the lock
that they ask for before they end."""


@pytest.mark.fault
def test_processes_without_a_job_end_with_their_command(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    study = [*study_overrides(tiny_base, "s"), "hydra/launcher=joblib"]
    mark = uuid.uuid4().hex
    process = station.start(
        *study,
        "hydra.sweeper.n_jobs=2",
        cwd=tmp_path,
        before=KILLED_AT_START,
        environment={MARK: mark},
    )
    process.wait()
    # The two have begun.
    assert len(marked_processes(mark)) >= 2
    end = time.monotonic() + 60
    while (left := marked_processes(mark)) and time.monotonic() < end:
        time.sleep(0.2)
    assert left == []
