"""Run whole commands: in a new process, or forked from a process that has their modules."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest


def run_cli(
    *arguments: str, cwd: Path, module: str = "finetune", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in a new process, as a user does."""
    env = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
    )


STATION = """
import atexit, gc, json, os, runpy, signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore SIGINT
exec(sys.argv[1])
gc.freeze()  # a child neither copies nor frees the memory of what is imported here
for line in sys.stdin:
    order = json.loads(line)
    if "poll" in order:
        print(json.dumps(os.waitpid(order["poll"], os.WNOHANG)), flush=True)
        continue
    child = os.fork()
    if child == 0:
        break
    print(child, flush=True)
else:
    os._exit(0)
os.setsid()
os.chdir(order["cwd"])
os.environ.clear()
os.environ.update(order["env"])
for number, path in enumerate((os.devnull, order["log"] + ".out", order["log"])):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
sys.argv = [order["module"], *order["arguments"]]
exec(order["before"])
code = 0
try:
    runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
except SystemExit as exit:
    if not isinstance(exit.code, int | None):
        raise
    code = exit.code or 0
# As a process ends, but for the last step, in which Python frees all that was imported: a second.
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""

TRAINING_IMPORTS = """
import finetune.engine.packed.training, finetune.run.samples, finetune.engine.trl.training
import finetune.plan, finetune.run.conclude, finetune.run.memory_plan, finetune.run.prepare
import sweeps.answer.conclusion, sweeps.launcher, sweeps.study.pack, sweeps.sweeper, sweeps.study.worker
from finetune.data.sources import python_docs
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
Plugins.instance()
OverridesParser.create().parse_overrides(["a=choice(1,2)"])
python_docs()
"""
"""All that a run or a study imports, torch included, and the rows of the default data set."""

LIGHT_IMPORTS = """
import hydra.main, optuna
import finetune.app, finetune.config.schema, finetune.run.job, sweeps.launcher, sweeps.sweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
Plugins.instance()
OverridesParser.create().parse_overrides(["a=choice(1,2)"])
assert not {"torch", "datasets", "transformers", "huggingface_hub"} & set(sys.modules)
"""
"""What a command imports up to the checked config, without torch or anything that reads the
environment."""


SLOW_STEPS = """
import time
from finetune.engine.reporter import Reporter
step = Reporter.report_step
def slow_step(*arguments, **more):
    time.sleep(0.5)
    return step(*arguments, **more)
Reporter.report_step = slow_step
"""
"""Makes each step take half a second, so that a test can act in the middle of a run on a busy machine too."""


class Forked:
    """A running command, in its own process group."""

    def __init__(self, station: "Station", pid: int, log: Path) -> None:
        self._station, self.pid, self._log = station, pid, log
        self._returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code as subprocess does; None while the command runs."""
        if self._returncode is None:
            pid, status = self._station.ask({"poll": self.pid})
            if pid:
                self._returncode = os.waitstatus_to_exitcode(status)
        return self._returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the whole process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self, seconds: float = 240) -> subprocess.CompletedProcess[str]:
        """Wait for the end of the command, and return its exit code and output."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                os.killpg(self.pid, signal.SIGKILL)
                pytest.fail(f"not ended after {seconds} s: {self.said()}")
            time.sleep(0.02)
        code = self.poll() or 0
        return subprocess.CompletedProcess([], code, self.printed(), self.said())

    def printed(self) -> str:
        """Return what the command has written to stdout so far."""
        path = Path(f"{self._log}.out")
        return path.read_text() if path.exists() else ""

    def said(self) -> str:
        """Return what the command has written to stderr so far."""
        return self._log.read_text() if self._log.exists() else ""


class Station:
    """Starts commands by forking a process that has imported their modules already.

    A forked command is as real as a new process and saves the imports: 5 to 10 s with torch, half a
    second without.

    Args:
        logs: Folder for the output of the commands.
        imports: Python code that the process runs before its first fork.
    """

    def __init__(self, logs: Path, imports: str = TRAINING_IMPORTS) -> None:
        self._logs, self._count = logs, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes: dict[str, Any] = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "text": True,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", STATION, imports], env=environment, **pipes
        )
        assert self._process.stdout is not None
        lines = iter(self._process.stdout)
        self._answers = (
            line for line in lines if not line.startswith("[INFO]")
        )  # transformers' remark on W&B

    def ask(self, order: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(next(self._answers))

    def start(
        self,
        *arguments: str,
        cwd: Path,
        module: str = "finetune",
        before: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> Forked:
        """Start a command.

        Args:
            arguments: Its command line behind `python -m MODULE`.
            cwd: Its working directory, made where it is missing.
            module: The module that is run.
            before: Python code that its process runs first.
            environment: Variables to set besides those of this process.
        """
        self._count += 1
        log = self._logs / f"{self._count}.log"
        cwd.mkdir(parents=True, exist_ok=True)
        order = {
            "arguments": arguments,
            "cwd": str(cwd),
            "module": module,
            "before": before,
        }
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        return Forked(self, self.ask({**order, "env": variables, "log": str(log)}), log)

    def run(
        self, *arguments: str, cwd: Path, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; takes the arguments of `start`."""
        return self.start(*arguments, cwd=cwd, **more).wait()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def wait_until(
    true: Callable[[], bool],
    process: Forked | subprocess.Popen[str],
    seconds: float = 300,
) -> None:
    """Wait until a condition holds; fail if the process ends before."""
    end = time.monotonic() + seconds
    while not true():
        lives = process.poll() is None
        assert lives or true(), getattr(process, "said", lambda: "ended")()
        assert time.monotonic() < end, f"the condition did not hold within {seconds} s"
        time.sleep(0.01)
