"""What W&B's server shows of a whole study: of a synchronized one, and of a live one."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.commands import SLOW_STEPS, Station
from support.configs import study_overrides
from support.matrix import further
from support.wandb_runs import connected, run_sync
from support.wandb_server import Behaviour, WandbServer, wandb_server

from finetune.config.flatten import flatten
from finetune.files.atomic import read_json
from finetune.files.run_folder import RunFolder
from sweeps.study.study import Study

pytestmark = pytest.mark.slow

QUICK_SERVER = """
import os
os.environ.pop("WANDB_SERVICE", None)
import finetune.tracking.wandb_arguments as arguments
arguments.INIT_TIMEOUT, arguments.FINISH_TIMEOUT, arguments.UPLOAD_TIMEOUT = 3, 4, 4
"""
"""Waits shortly for the server, which is beside; and has a W&B process of its own."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with connected(monkeypatch) as stub:
        yield stub


class Runner:
    """Runs a study of a tiny base in a folder, online or offline."""

    def __init__(self, station: Station, tiny_base: Path, cwd: Path, mode: str) -> None:
        self._station, self._cwd = station, cwd
        self._overrides = [
            *study_overrides(tiny_base, "s1"),
            "tracker=wandb",
            f"tracker.mode={mode}",
            "tracker.tags=[mine]",
            "tracker.adapters=best",
            "hydra.sweeper.slots=2",
        ]
        self.folder = cwd / "outputs" / "sweeps" / "s1"

    def start(self, trials: int, before: str = QUICK_SERVER) -> Any:
        return self._station.start(
            *self._overrides,
            f"hydra.sweeper.n_trials={trials}",
            cwd=self._cwd,
            before=before,
        )

    def run(self, trials: int) -> str:
        return self.end(self.start(trials))

    def end(self, command: Any) -> str:
        ended = command.wait(400)
        assert ended.returncode == 0, ended.stderr
        return str(ended.stderr)

    def sync(self, said: str) -> str:
        """Run the last `wandb sync` command that the study has printed."""
        command = re.findall(r"wandb sync .*", said)[-1]
        return run_sync(command, self._cwd)


def assert_shows_study(server: WandbServer, folder: Path) -> None:
    """Check that the server shows each trial as the study's folder has it."""
    study = Study.load(folder)
    trials = study.trials()
    repeats = [read_json(path)["id"] for path in folder.glob("baseline/*/tracker.json")]
    numbers = [trial.number for trial in trials]
    ids = [*(f"{study.uid}-{number}" for number in numbers), *repeats]
    assert sorted(server.runs) == sorted(ids)
    # One file for each.
    assert len(list(folder.glob("wandb/*run-*"))) == len(ids)
    for run_id in repeats:
        shown = server.runs[run_id]
        assert (shown.group, shown.job_type) == ("s1", "baseline")
        assert shown.name == f"t00 seed={shown.config['seed']['value']}"
        assert shown.summary["status"] in ("completed", "interrupted")
    winner = read_json(folder / "answer.json")["trial"]
    for trial in trials:
        shown = server.runs[f"{study.uid}-{trial.number}"]
        run = study.folder_of(trial.number)
        result = read_json(run.result)
        assert shown.name.startswith(f"t{trial.number:02d} r={trial.params['lora.r']} ")
        assert (shown.group, shown.job_type) == ("s1", "trial")
        config = {key: item["value"] for key, item in shown.config.items()}
        del config["_wandb"]
        recorded = read_json(run.identity)["config"]
        # A command of this machine is none of a tracker's concern.
        del recorded["notify"]
        given = flatten(recorded)
        # W&B's client drops empty mappings.
        given = {key: value for key, value in given.items() if value != {}}
        assert flatten(config) == given
        assert shown.summary["status"] == result["status"]
        final = {name: shown.summary[name] for name in result["metrics"]}
        assert final == pytest.approx(result["metrics"])
        assert_shows_history(shown.history, run)
        is_winner = trial.number == winner
        assert sorted(shown.tags) == (["best", "mine"] if is_winner else ["mine"])
        assert {"config.yaml", "wandb-summary.json"} <= shown.files.keys()
        assert shown.exit_code == 0
    shown = server.runs[f"{study.uid}-{winner}"]
    report = (folder / "report.html").read_bytes()
    assert shown.artifacts["s1-report"].files == {"report.html": report}
    adapter = {
        file.name: file.read_bytes() for file in (folder / "best/adapter").iterdir()
    }
    assert shown.artifacts["s1-adapter"].files == adapter
    assert "test/loss" in shown.summary


def assert_shows_history(history: dict[int, dict[str, Any]], run: RunFolder) -> None:
    """Check that a history has the metrics of each step, but for those of the test rows."""
    logged: dict[int, dict[str, Any]] = {}
    for row in run.metrics():
        metrics = {key: value for key, value in row.items() if "test/" not in key}
        logged.setdefault(row["step"], {}).update(metrics)
    shown = {}
    for step, row in history.items():
        names = [name for name in row if not name.startswith(("_", "samples"))]
        shown[step] = {"step": step, **{name: row[name] for name in names}}
    assert shown.keys() == logged.keys()
    for step, metrics in logged.items():
        assert shown[step] == pytest.approx(metrics)


def test_an_offline_study_is_shown_whole_by_the_command_that_it_prints(
    server: WandbServer, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    runner = Runner(station, tiny_base, tmp_path, "offline")
    said = runner.run(3)
    assert not server.runs
    runner.sync(said)
    assert_shows_study(server, runner.folder)

    said = runner.run(5)
    runner.sync(said)
    assert_shows_study(server, runner.folder)
    assert "wandb sync" not in runner.run(5)


def test_a_live_study_is_shown_whole(
    server: WandbServer, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    runner = Runner(station, tiny_base, tmp_path, "online")
    said = runner.run(3)
    assert_shows_study(server, runner.folder)
    assert "wandb sync" not in said
    runner.run(4)
    assert_shows_study(server, runner.folder)


@pytest.mark.fault
@pytest.mark.parametrize("behaviour", [*further("refuse", "hang"), "die"])
def test_a_live_study_whose_server_fails_is_shown_whole_by_the_command_that_it_prints(
    behaviour: Behaviour | str,
    server: WandbServer,
    station: Station,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = Runner(station, tiny_base, tmp_path, "online")
    command = runner.start(4, QUICK_SERVER + SLOW_STEPS)
    end = time.monotonic() + 120
    while not any(shown.exit_code is not None for shown in server.runs.values()):
        assert time.monotonic() < end, command.said()
        assert command.poll() is None, command.said()
        time.sleep(0.05)
    if behaviour == "die":
        server.die()
    else:
        server.behaviour = behaviour  # type: ignore[assignment]
    said = runner.end(command)
    assert said.count("kept offline") == 1

    with wandb_server() as next_server:
        monkeypatch.setenv("WANDB_BASE_URL", next_server.address)
        next_server.runs = server.runs
        runner.sync(said)
        assert_shows_study(next_server, runner.folder)


@pytest.mark.fault
def test_a_study_that_is_killed_and_resumed_is_shown_whole(
    server: WandbServer, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    runner = Runner(station, tiny_base, tmp_path, "offline")
    command = runner.start(2, QUICK_SERVER + SLOW_STEPS)
    end = time.monotonic() + 120
    while not list(
        runner.folder.glob("trials/*/checkpoints/checkpoint-*/progress.json")
    ):
        assert time.monotonic() < end, command.said()
        time.sleep(0.05)
    command.kill()
    said = runner.run(3)
    runner.sync(said)
    assert_shows_study(server, runner.folder)
