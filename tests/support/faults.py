"""Studies of several processes, and what kills them."""

import contextlib
import os
import random
import re
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from finetune.files.atomic import read_json
from finetune.files.run_folder import checkpoint_step, checkpoints_in
from support.commands import Forked, Station
from support.postgres import Server
from support.study_folder import folder_of, metrics_of, told
from sweeps.study.starts import needs_isolation
from sweeps.study.study import FINISHED, Study

WORKERS = 4
TRIALS = 12
STEPS = 5

MARK = "FAULTS_STUDY"
"""A variable that all processes of a study have, however deep they are."""

SLOW_PRUNER = """
import time
from optuna.pruners import BasePruner
class SlowPruner(BasePruner):
    def prune(self, study, trial):
        time.sleep(0.2)
        return False
"""
"""A user's pruner, asked after each step: it gives the faults time to hit a trial."""

SIZES = (
    f"hydra.sweeper.n_trials={TRIALS}",
    f"hydra.sweeper.n_jobs={WORKERS}",
    "hydra.sweeper.baseline_seeds=0",
    "hydra/sweeper/pruner=none",
    "hydra.sweeper.pruner._target_=slow_pruner.SlowPruner",
    f"trainer.max_steps={STEPS}",
    "trainer.save_steps=1",
    "trainer.eval_steps=1",
)


class FaultyStudy:
    """A study whose processes are killed, and which is started again each time.

    Args:
        station: starts the command.
        overrides: the study's overrides, without its sizes.
        name: the study's name.
        directory: the command's directory, made by this.
        chance: the source of what is killed when.
        server: its database; None: the journal.
    """

    def __init__(
        self,
        station: Station,
        overrides: list[str],
        name: str,
        directory: Path,
        chance: random.Random,
        server: Server | None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "slow_pruner.py").write_text(SLOW_PRUNER)
        self._station, self.directory, self._chance = station, directory, chance
        self._server = server
        self.folder = folder_of(directory, name)
        self.mark = uuid.uuid4().hex
        self.temporary = directory / "tmp"
        self.temporary.mkdir()
        self._environment = {
            **variables_of(directory, server),
            MARK: self.mark,
            "TMPDIR": str(self.temporary),
        }
        self._words = [*overrides, *SIZES]
        if server is not None:
            self._words.append("hydra.sweeper.storage=${oc.env:STUDY_DATABASE}")
        self._launchers: list[int] = []
        self._memory_before = set(Path("/dev/shm").iterdir())
        self.process = self._start()
        self._ended: dict[int, tuple[Any, ...]] = {}

    def _start(self) -> Forked:
        process = self._station.start(
            *self._words, cwd=self.directory, environment=self._environment
        )
        self._launchers.append(process.pid)
        return process

    def study(self) -> Study:
        with variables(self._environment):
            return Study.load(self.folder)

    def inflict(self, kind: str) -> bool:
        """Kill something at a random moment while trials run.

        Args:
            kind: worker, launcher (the sweep's main process) or database.

        Returns:
            Whether it was hit; False: the study has ended.
        """
        if not self._wait_for_running_trials():
            return False
        self._pause(1.5)
        if self.process.poll() is not None:
            return False
        kill = {
            "worker": self._kill_worker,
            "launcher": self._kill_launcher,
            "database": self._kill_database,
        }[kind]
        return kill()

    def _pause(self, longest: float) -> None:
        """Wait for a random time, or until the study ends."""
        end = time.monotonic() + self._chance.uniform(0, longest)
        while time.monotonic() < end and self.process.poll() is None:
            time.sleep(0.05)

    def _wait_for_running_trials(self) -> bool:
        """Wait until trials run and none could fail with another loss; False: the study ended."""
        end = time.monotonic() + 240
        while time.monotonic() < end:
            if self.process.poll() is not None:
                return False
            if self.workers() and not self._any_at_risk():
                return True
            time.sleep(0.1)
        raise AssertionError(f"no trial runs: {self.process.said()}")

    def _any_at_risk(self) -> bool:
        """Whether a trial has lost two workers without a new checkpoint."""
        study = self.study()
        for trial in filter(needs_isolation, study.trials(TrialState.RUNNING)):
            # Only read: `last_checkpoint` would remove the one that is being written.
            checkpoints = checkpoints_in(study.folder_of(trial.number).checkpoints)
            steps = [checkpoint_step(path) for path in checkpoints]
            if max(steps, default=0) == trial.user_attrs["starts"][-1]:
                return True
        return False

    def workers(self) -> list[int]:
        """The processes that hold a trial's folder."""
        return [
            pid
            for pid in processes_that_hold(self.folder / "trials")
            if pid != self.process.pid
        ]

    def _kill_worker(self) -> bool:
        workers = self.workers()
        if not workers:
            return False
        try:
            os.kill(self._chance.choice(workers), signal.SIGKILL)
        except ProcessLookupError:
            return False  # It has just ended by itself.
        # Some of the next faults come before the launcher has told of this one, some after.
        self._pause(6)
        return True

    def _kill_launcher(self) -> bool:
        """Kill the sweep's main process, and start the command again."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.check_nothing_is_lost()
        self.process = self._start()
        return True

    def _kill_database(self) -> bool:
        assert self._server is not None
        self._server.kill()
        time.sleep(self._chance.uniform(0, 1))
        self._server.start()
        return True

    def check_nothing_is_lost(self) -> None:
        """Check that there are exactly the trials, and that what has ended stays as it was."""
        trials = self.study().trials()
        assert [trial.number for trial in trials] == list(range(TRIALS))
        ended = {
            trial.number: (told(trial), self._lines(trial))
            for trial in trials
            if trial.state in FINISHED
        }
        assert {number: ended.get(number) for number in self._ended} == self._ended
        self._ended = ended

    def _lines(self, trial: FrozenTrial) -> list[dict[str, Any]]:
        """What its training wrote; test rows come last, for the winner and the baseline."""
        rows = metrics_of(self.folder / "trials" / str(trial.number))
        return [row for row in rows if "test/loss" not in row]

    def end(self) -> None:
        """Let the study end, and check that each trial was trained exactly once."""
        ended = self.process.wait()
        assert ended.returncode == 0, ended.stderr
        self.check_nothing_is_lost()
        for trial in self.study().trials():
            assert trial.state == TrialState.COMPLETE, trial.user_attrs
            assert (
                read_json(self.folder / "trials" / str(trial.number) / "result.json")[
                    "status"
                ]
                == "completed"
            )
            steps = [row["step"] for row in self._lines(trial) if "train/loss" in row]
            assert steps == list(range(1, STEPS + 1)), (trial.number, steps)
            assert sorted(trial.intermediate_values) == list(range(1, STEPS + 1))

    def leftovers(self) -> list[str]:
        """What it has left behind a while after its end: processes, and temporary files."""
        end = time.monotonic() + 30
        while (leftovers := self._leftovers()) and time.monotonic() < end:
            time.sleep(0.2)
        return leftovers

    def _leftovers(self) -> list[str]:
        pids = "|".join(map(str, self._launchers))
        memory = [
            str(path)
            for path in Path("/dev/shm").iterdir()
            if re.search(rf"[-_]({pids})[-_]", path.name)
            and path not in self._memory_before
        ]
        files = [str(path) for path in self.temporary.iterdir()]
        hidden = [str(path) for path in self.folder.glob(".*-*")]
        return [*marked_processes(self.mark), *memory, *files, *hidden]

    def __enter__(self) -> "FaultyStudy":
        return self

    def __exit__(self, *error: object) -> None:
        """Leave nothing of a test that has failed."""
        for line in marked_processes(self.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(line.split()[0]), signal.SIGKILL)
        self.process.poll()


def variables_of(directory: Path, server: Server | None) -> dict[str, str]:
    """Variables that the workers of a study need, however they are started."""
    paths = os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")])
    address = {} if server is None else {"STUDY_DATABASE": server.address}
    return {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **address}


def processes_that_hold(trials: Path) -> list[int]:
    """The processes that have the lock of a trial's folder open."""
    numbers = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            opened = [os.readlink(link) for link in (folder / "fd").iterdir()]
            if any(
                path.startswith(f"{trials}/") and path.endswith(".lock")
                for path in opened
            ):
                numbers.append(int(folder.name))
    return numbers


def marked_processes(mark: str) -> list[str]:
    """The processes that live and have the mark in their environment."""
    processes = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                processes.append(f"{folder.name} {title}")
    return processes


@contextlib.contextmanager
def variables(values: dict[str, str]) -> Iterator[None]:
    """Set variables of this process within the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
