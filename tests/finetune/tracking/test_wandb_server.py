"""What W&B's server shows of a run at the end: of a synchronized offline run, and of a live one."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.wandb_log import wandb_files
from support.wandb_server import ShownRun, WandbServer, wandb_server

from finetune.config.schema import RunConfig
from finetune.files.atomic import read_json
from finetune.files.run_folder import RunFolder
from finetune.run.context import RunContext
from finetune.run.run import run
from finetune.tracking.tracker import Label
from finetune.tracking.wandb import WandbTracker, _server_failure
from finetune.tracking.wandb_arguments import TRACKER
from finetune.tracking.wandb_finished import add_tag, reopen_run

Tiny = Callable[..., RunConfig]

QUICK = (
    "tracker=wandb",
    "trainer.max_steps=2",
    "sample_prompts=[]",
    "quantization=none",
    "dataset.max_length=64",
    "trainer.save_steps=0",
)

TRIAL = RunContext(label=Label("abc-0", "s1-0", "s1", "trial"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    import wandb

    with wandb_server() as stub:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", stub.address)
        # W&B reads the address once in a process.
        wandb.teardown()
        _server_failure.clear()
        yield stub
        _server_failure.clear()
        wandb.teardown()


def sync(folder: Path) -> None:
    """Synchronize the offline files of a run's folder in a process of its own."""
    wandb_files(folder)  # waits until W&B has written them
    files = sorted(str(path) for path in folder.glob("wandb/offline-run-*"))
    environment = {**os.environ, "WANDB_MODE": "online"}
    command = [sys.executable, "-m", "wandb", "sync", *files]
    # W&B writes its log below the working directory.
    subprocess.run(command, cwd=folder, env=environment, check=True, timeout=120)


def assert_whole(shown: ShownRun, folder: Path) -> None:
    """Check that the server shows a completed trial with its config, summary and history."""
    metrics = read_json(folder / "result.json")["metrics"]
    assert (shown.name, shown.group, shown.job_type) == ("s1-0", "s1", "trial")
    assert shown.config["lora"]["value"]["r"] == 16
    assert shown.summary["status"] == "completed"
    assert shown.summary["objective"] == metrics["objective"]
    assert shown.summary["test/loss"] == 0.5
    steps = [row["_step"] for row in shown.history.values()]
    assert steps == sorted(set(steps))
    assert {1, 2} <= set(steps)
    assert shown.exit_code == 0


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_the_server_shows_a_winner_whole_that_gets_its_test_loss_afterwards(
    mode: str, server: WandbServer, tiny: Tiny, tmp_path: Path
) -> None:
    run(tiny(*QUICK, f"tracker.mode={mode}", "tracker.tags=[first]"), tmp_path, TRIAL)
    folder = RunFolder(tmp_path)
    add_tag(folder, "best")
    with reopen_run(folder, read_json(tmp_path / TRACKER)) as reopened:
        reopened.summary["test/loss"] = 0.5
    if mode == "offline":
        sync(tmp_path)

    assert list(server.runs) == ["abc-0"]
    assert sorted(server.runs["abc-0"].tags) == ["best", "first"]
    assert_whole(server.runs["abc-0"], tmp_path)


@pytest.mark.fault
def test_a_server_that_is_away_is_waited_for_once(
    server: WandbServer,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("finetune.tracking.wandb_arguments.INIT_TIMEOUT", 2)
    server.behaviour = "hang"
    config = tiny("tracker=wandb", "tracker.mode=online")
    for number in range(2):
        folder = RunFolder(tmp_path / str(number))
        folder.path.mkdir()
        label = Label(f"abc-{number}", f"s1-{number}", "s1", "trial")
        WandbTracker(config, folder, label).finish("completed", {})
        assert read_json(folder.path / TRACKER)["mode"] == "offline"
    warnings = [line for line in caplog.messages if "kept offline" in line]
    assert len(warnings) == 1
