"""W&B runs of trials without their training, and `wandb sync` against a stub server."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from finetune.files.run_folder import RunFolder
from finetune.tracking.tracker import Label
from finetune.tracking.wandb import WandbTracker
from finetune.tracking.wandb_server import server_failure
from support.configs import compose
from support.wandb_server import WandbServer, wandb_server


def open_tracker(study: Path, *overrides: str, number: int = 0) -> WandbTracker:
    """Open the W&B run of a trial of a study."""
    folder = RunFolder(study / "trials" / str(number))
    folder.path.mkdir(parents=True, exist_ok=True)
    label = Label(f"abc-{number}", f"t0{number} r=16", "s1", "trial", study)
    config = compose("tracker=wandb", "tracker.tags=[first]", *overrides)
    return WandbTracker(config, folder, label)


def log_steps(tracker: WandbTracker, first: int, last: int) -> None:
    for step in range(first, last + 1):
        loss = 10.0 - step
        tracker.log(step, {"train/loss": loss, "eval/loss": loss, "objective": loss})


def finish(tracker: WandbTracker, loss: float = 1.0) -> None:
    summary = {"eval/loss": loss, "objective": loss, "error": None}
    tracker.finish("completed", summary)


@contextmanager
def connected(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """Run a stub server that W&B in this process, and in those that it starts, is sent to."""
    import wandb

    with wandb_server() as stub:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", stub.address)
        # W&B reads the address once in a process.
        wandb.teardown()
        server_failure.clear()
        yield stub
        server_failure.clear()
        wandb.teardown()


def run_sync(command: str, cwd: Path) -> str:
    """Run a command as it is printed, `wandb sync …`, by a shell. Returns what it prints."""
    assert command.startswith("wandb sync ")
    environment = {**os.environ, "WANDB_MODE": "online"}
    environment.pop("WANDB_SERVICE", None)
    program = f"{sys.executable} -m {command}"
    ended = subprocess.run(
        program,
        shell=True,
        cwd=cwd,
        env=environment,
        check=True,
        timeout=120,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return ended.stdout
