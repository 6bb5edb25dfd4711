"""A Slurm cluster of one node: this machine."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAMS = (
    "munged",
    "mungekey",
    "slurmctld",
    "slurmd",
    "sbatch",
    "squeue",
    "scontrol",
    "scancel",
)


def require_slurm() -> None:
    """Skip where Slurm is not installed, or can't be started: `apt-get install slurm-wlm`, as root."""
    missing = [name for name in PROGRAMS if _program(name) is None]
    if missing:
        pytest.skip(f"no {missing[0]}: apt-get install slurm-wlm")
    if os.getuid() != 0:
        pytest.skip("slurmd runs as root")


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


class Cluster:
    """Two partitions of one node with two processors; a job of `high` preempts those of `low`."""

    def __init__(self, folder: Path) -> None:
        self.configuration = folder / "slurm.conf"
        host = socket.gethostname().partition(".")[0]
        for name in ("state", "spool"):
            (folder / name).mkdir()
        self.configuration.write_text(
            f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={_free_port()}
SlurmdPort={_free_port()}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SchedulerParameters=sched_interval=1
KillWait=20
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES State=UP PriorityTier=1
PartitionName=high Nodes={host} State=UP PriorityTier=10
"""
        )
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start the daemons, and wait till the node is idle."""
        folder = self._folder
        key = folder / "munge.key"
        subprocess.run(
            [_program("mungekey"), "--create", f"--keyfile={key}"], check=True
        )
        places = {
            "socket": "munge.socket",
            "pid-file": "munge.pid",
            "log-file": "munge.log",
            "seed-file": "munge.seed",
        }
        options = [f"--{name}={folder / file}" for name, file in places.items()]
        self._run("munged", "--foreground", "--force", f"--key-file={key}", *options)
        self._wait(lambda: (folder / "munge.socket").exists())
        self._run("slurmctld", "-D", "-f", str(self.configuration))
        self._run("slurmd", "-D", "-f", str(self.configuration))
        self._wait(lambda: "idle" in self.ask("sinfo", "--noheader", "--format=%T"))

    def _run(self, name: str, *arguments: str) -> None:
        with open(self._folder / f"{name}.out", "wb") as log:
            process = subprocess.Popen(
                [str(_program(name)), *arguments],
                stdout=log,
                stderr=log,
                env=self._environment,
            )
        self._processes.append(process)

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.configuration)}

    def _wait(self, is_met: "object") -> None:
        end = time.monotonic() + 60
        while not is_met():  # type: ignore[operator]
            assert time.monotonic() < end, "Slurm does not start"
            time.sleep(0.1)

    def ask(self, *command: str) -> str:
        """Run one of Slurm's commands; return what it prints."""
        done = subprocess.run(
            command, env=self._environment, capture_output=True, text=True
        )
        return done.stdout

    def preempt(self) -> None:
        """Let a short job that needs the whole node preempt the others."""
        self.ask(
            "sbatch",
            "--partition=high",
            "--ntasks=2",
            "--output=/dev/null",
            "--wrap=sleep 1",
        )

    def begin_again(self) -> None:
        """Let preempted jobs begin at once: Slurm makes them wait for two minutes."""
        for number in self.ask(
            "squeue", "--noheader", "--format=%A", "--states=PENDING"
        ).split():
            self.ask("scontrol", "update", f"JobId={number}", "StartTime=now")

    def stop(self) -> None:
        """Cancel all jobs, and stop the daemons."""
        self.ask("scancel", "--user=root")
        end = time.monotonic() + 30
        while self.ask("squeue", "--noheader") and time.monotonic() < end:
            time.sleep(0.2)
        for process in reversed(self._processes):
            process.terminate()
            process.wait(30)


@contextlib.contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Start a cluster, and stop it when the block ends."""
    require_slurm()
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)
