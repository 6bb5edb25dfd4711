"""What W&B's server shows of a run at the end: of a synchronized offline run, and of a live one."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.matrix import further
from support.wandb_runs import connected, finish, log_steps, open_tracker, run_sync
from support.wandb_server import Behaviour, ShownRun, WandbServer

from finetune.config.schema import RunConfig
from finetune.files.atomic import read_json
from finetune.files.run_folder import PROGRESS, RunFolder
from finetune.run.context import RunContext
from finetune.run.run import run
from finetune.tracking.tracker import Label
from finetune.tracking.wandb_arguments import TRACKER
from finetune.tracking.wandb_artifacts import log_artifact
from finetune.tracking.wandb_finished import add_tag, add_to_run, reopen_run
from finetune.tracking.wandb_server import server_failure

Tiny = Callable[..., RunConfig]

QUICK = (
    "tracker=wandb",
    "trainer.max_steps=2",
    "sample_prompts=[A?]",
    "quantization=none",
    "dataset.max_length=64",
    "trainer.save_steps=0",
)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    monkeypatch.setattr("finetune.tracking.wandb_arguments.INIT_TIMEOUT", 2)
    monkeypatch.setattr("finetune.tracking.wandb_arguments.FINISH_TIMEOUT", 3)
    monkeypatch.setattr("finetune.tracking.wandb_arguments.UPLOAD_TIMEOUT", 3)
    with connected(monkeypatch) as stub:
        yield stub


def trial_folder(study: Path, number: int = 0) -> RunFolder:
    return RunFolder(study / "trials" / str(number))


def publish(study: Path, winner: int = 0) -> None:
    """Do what a study's end does with its winner."""
    folder = trial_folder(study, winner)
    report = study / "report.html"
    report.write_text("<p>")
    add_tag(folder, "best")
    with reopen_run(folder, uploads=True) as reopened:
        reopened.summary["test/loss"] = 0.5
        log_artifact(reopened, "s1-report", "report", report)


def assert_whole(shown: ShownRun, steps: list[int]) -> None:
    """Check that the server shows all of a completed trial."""
    assert (shown.group, shown.job_type) == ("s1", "trial")
    assert shown.config["lora"]["value"]["r"] == 16
    assert shown.config["_wandb"]["value"]["m"], "the directions of the metrics"
    assert shown.summary["status"] == "completed"
    assert shown.summary["eval/loss"] == 1.0
    assert shown.summary["objective"] == 1.0
    assert [row["_step"] for _, row in sorted(shown.history.items())] == steps
    assert {"config.yaml", "wandb-summary.json"} <= shown.files.keys()
    assert shown.exit_code == 0


def assert_published(shown: ShownRun) -> None:
    assert shown.tags == ["first", "best"]
    assert shown.summary["test/loss"] == 0.5
    assert shown.artifacts["s1-report"].files == {"report.html": b"<p>"}


def test_a_trained_run_is_shown_with_its_samples(
    server: WandbServer, tiny: Tiny, tmp_path: Path
) -> None:
    label = Label("abc-0", "t00 r=16", "s1", "trial")
    run(tiny(*QUICK, "tracker.mode=offline"), tmp_path, RunContext(label=label))
    run_sync("wandb sync wandb", tmp_path)

    shown = server.runs["abc-0"]
    metrics = read_json(tmp_path / "result.json")["metrics"]
    assert {name: shown.summary[name] for name in metrics} == metrics
    assert shown.name == "t00 r=16"
    assert any("samples" in row for row in shown.history.values())
    assert shown.artifacts["run-abc-0-samples"].files
    assert any(name.startswith("media/table/samples") for name in shown.files)


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_the_server_shows_a_winner_whole_that_is_published_afterwards(
    mode: str, server: WandbServer, tmp_path: Path
) -> None:
    tracker = open_tracker(tmp_path, f"tracker.mode={mode}")
    log_steps(tracker, 1, 4)
    finish(tracker)
    publish(tmp_path)
    if mode == "offline":
        assert not server.runs
        run_sync("wandb sync wandb", tmp_path)

    assert list(server.runs) == ["abc-0"]
    assert_whole(server.runs["abc-0"], [1, 2, 3, 4])
    assert_published(server.runs["abc-0"])


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_what_is_sent_again_is_shown_once(
    mode: str, server: WandbServer, tmp_path: Path
) -> None:
    tracker = open_tracker(tmp_path, f"tracker.mode={mode}")
    log_steps(tracker, 1, 3)
    tracker.finish("interrupted", {})
    folder = trial_folder(tmp_path).checkpoints / "checkpoint-3"
    folder.mkdir(parents=True)
    (folder / PROGRESS).write_text("{}")
    tracker = open_tracker(tmp_path, f"tracker.mode={mode}")
    log_steps(tracker, 4, 6)
    finish(tracker)
    publish(tmp_path)

    for _ in range(2):
        run_sync("wandb sync --no-skip-online --no-skip-synced wandb", tmp_path)
        assert_whole(server.runs["abc-0"], [1, 2, 3, 4, 5, 6])
        assert_published(server.runs["abc-0"])


def test_what_comes_after_a_synchronisation_is_sent_by_the_next_one(
    server: WandbServer, tmp_path: Path
) -> None:
    for number in range(2):
        tracker = open_tracker(tmp_path, number=number)
        log_steps(tracker, 1, 3)
        finish(tracker)
    run_sync("wandb sync wandb", tmp_path)
    assert server.runs.keys() == {"abc-0", "abc-1"}

    publish(tmp_path)
    tracker = open_tracker(tmp_path, number=2)
    log_steps(tracker, 1, 3)
    finish(tracker)
    said = run_sync("wandb sync wandb", tmp_path)

    assert "Skipped 1 synced run(s)" in said
    assert server.runs.keys() == {"abc-0", "abc-1", "abc-2"}
    for shown in server.runs.values():
        assert_whole(shown, [1, 2, 3])
    assert_published(server.runs["abc-0"])


def test_a_run_that_is_sent_while_it_trains_is_sent_again_at_its_end(
    server: WandbServer, tmp_path: Path
) -> None:
    tracker = open_tracker(tmp_path)
    log_steps(tracker, 1, 3)
    time.sleep(1.5)
    run_sync("wandb sync wandb", tmp_path)
    log_steps(tracker, 4, 6)
    finish(tracker)
    run_sync("wandb sync wandb", tmp_path)
    assert_whole(server.runs["abc-0"], [1, 2, 3, 4, 5, 6])


def change(server: WandbServer, behaviour: Behaviour | str) -> None:
    if behaviour == "die":
        server.die()
    else:
        server.behaviour = behaviour  # type: ignore[assignment]


@pytest.mark.fault
@pytest.mark.parametrize("behaviour", [*further("refuse", "hang"), "die"])
@pytest.mark.parametrize("when", ["before", "within", "after"])
def test_a_server_that_fails_costs_nothing_that_one_sync_does_not_send(
    when: str,
    behaviour: str,
    server: WandbServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Three trials, one after the other; the server fails at the first one."""
    began = time.monotonic()
    for number in range(3):
        if number == 0 and when == "before":
            change(server, behaviour)
        tracker = open_tracker(tmp_path, "tracker.mode=online", number=number)
        log_steps(tracker, 1, 3)
        if number == 0 and when == "within":
            time.sleep(0.5)
            change(server, behaviour)
        log_steps(tracker, 4, 5)
        if when != "within":
            adapter = trial_folder(tmp_path, number).adapter
            adapter.mkdir()
            (adapter / "weights").write_text(str(number))
            tracker.log_adapter(adapter)
        finish(tracker)
        if number == 0 and when == "after":
            change(server, behaviour)
    # Afterwards, the first trial is known to be whole on the server: it is opened once more.
    winner = 0 if when == "after" else 1
    publish(tmp_path, winner)
    # Each of the first start and the first end waits at most once.
    assert time.monotonic() - began < 20
    lines = [text for text in caplog.messages if "kept offline" in text]
    assert len(lines) == 1
    assert read_json(trial_folder(tmp_path).path / TRACKER)["mode"] == "offline"
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 3

    with connected(monkeypatch) as next_server:
        next_server.runs = server.runs
        run_sync("wandb sync wandb", tmp_path)
        assert next_server.runs.keys() == {"abc-0", "abc-1", "abc-2"}
        for shown in next_server.runs.values():
            assert_whole(shown, [1, 2, 3, 4, 5])
        for number in range(3) if when != "within" else ():
            artifact = next_server.runs[f"abc-{number}"].artifacts["s1-adapter"]
            assert artifact.files == {"weights": str(number).encode()}
        assert_published(next_server.runs[f"abc-{winner}"])


@pytest.mark.fault
def test_open_runs_do_not_all_wait_for_a_server_that_is_gone(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Far apart: once five seconds, or four times.
    monkeypatch.setattr("finetune.tracking.wandb_arguments.FINISH_TIMEOUT", 5)
    monkeypatch.setattr("finetune.tracking.wandb_server.GIVEN_UP_SECONDS", 0.2)
    trackers = [
        open_tracker(tmp_path, "tracker.mode=online", number=number)
        for number in range(4)
    ]
    for tracker in trackers:
        log_steps(tracker, 1, 3)
    server.behaviour = "hang"
    began = time.monotonic()
    for tracker in trackers:
        finish(tracker)
    assert time.monotonic() - began < 11
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 4


def test_the_line_of_a_single_run_names_a_command_that_sends_it(
    server: WandbServer, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in (tmp_path / "a b", tmp_path / "shared"):
        if place.name == "shared":
            monkeypatch.setenv("WANDB_DIR", str(place))
            place.mkdir()
        monkeypatch.chdir(tmp_path)
        tracker = open_tracker(tmp_path / "a b")
        log_steps(tracker, 1, 3)
        finish(tracker)
        (line,) = tracker.locations()
        command = line.removeprefix("W&B: offline; ")
        run_sync(command, tmp_path)
        assert_whole(server.runs.pop("abc-0"), [1, 2, 3])
        shutil.rmtree(tmp_path / "a b")


@pytest.mark.fault
@pytest.mark.parametrize("behaviour", ["refuse", "hang", "die"])
def test_a_server_that_fails_within_publishing_costs_nothing(
    behaviour: str,
    server: WandbServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tracker = open_tracker(tmp_path, "tracker.mode=online")
    log_steps(tracker, 1, 3)
    finish(tracker)
    folder = trial_folder(tmp_path)
    add_tag(folder, "best")
    report = tmp_path / "report.html"
    report.write_text("<p>")

    def add(reopened: Any) -> None:
        reopened.summary["test/loss"] = 0.5
        log_artifact(reopened, "s1-report", "report", report)
        if not server_failure.is_set():
            change(server, behaviour)

    add_to_run(folder, add, uploads=True)

    with connected(monkeypatch) as next_server:
        next_server.runs = server.runs
        run_sync("wandb sync wandb", tmp_path)
        assert_whole(next_server.runs["abc-0"], [1, 2, 3])
        assert_published(next_server.runs["abc-0"])
