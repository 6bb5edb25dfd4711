"""A W&B run that is opened several times stands in one file, with everything that was logged."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.wandb_log import wandb_files, wandb_history, wandb_items, wandb_summary
from support.wandb_runs import finish, log_steps, open_tracker

from finetune.compat import wandb_record_class
from finetune.files.atomic import read_json
from finetune.files.run_folder import PROGRESS, RunFolder
from finetune.tracking import wandb_fragments
from finetune.tracking.wandb_arguments import TRACKER
from finetune.tracking.wandb_artifacts import log_artifact
from finetune.tracking.wandb_file import read_records, write_records
from finetune.tracking.wandb_finished import add_tag, remove_tag, reopen_run
from finetune.tracking.wandb_fragments import fragment_files, join_fragments


def checkpoint(study: Path, step: int) -> None:
    """Give the trial a checkpoint, from which it would continue."""
    folder = RunFolder(study / "trials" / "0").checkpoints / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / PROGRESS).write_text("{}")


def only_file(study: Path, number: int = 0) -> Path:
    (file,) = fragment_files(study, f"abc-{number}")
    return file


def only_records(study: Path) -> list[Any]:
    (records,) = wandb_files(study, "abc-0")
    return records


def opened(records: list[Any]) -> Any:
    (run,) = [record.run for record in records if record.HasField("run")]
    return run


def steps_of(records: list[Any]) -> list[int]:
    return [row["_step"] for row in wandb_history(records)]


def assert_whole(study: Path, steps: list[int]) -> None:
    """Check that the trial's one file says what that of a run without interruption says."""
    records = only_records(study)
    run, summary = opened(records), wandb_summary(records)
    assert (run.run_id, run.run_group, run.job_type) == ("abc-0", "s1", "trial")
    assert not run.resume
    assert wandb_items(run.config.update)["lora"]["r"] == 16
    assert steps_of(records) == steps
    assert summary["status"] == "completed"
    assert summary["eval/loss"] == 1.0
    assert "error" in summary
    for row in wandb_history(records):
        assert row["eval/loss"] == 10 - row["_step"]
    runtimes = [row["_runtime"] for row in wandb_history(records)]
    assert runtimes == sorted(runtimes)
    # What stands behind the end is not sent.
    assert [record.HasField("exit") for record in records].index(True) == (
        len(records) - 1
    )
    assert records[-1].exit.exit_code == 0


def test_a_file_that_is_written_is_read_back_whatever_its_records_sizes(
    tmp_path: Path,
) -> None:
    record_class = wandb_record_class()
    path = tmp_path / "run-a.wandb"
    # Around the size of a block, and over several of them.
    for size in (0, 1, *range(32730, 32775), 100_000):
        records = [record_class(), record_class(), record_class()]
        for record in records:
            record.run.notes = "x" * size
        write_records(path, records)
        assert read_records(path) == records
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.fault
def test_a_file_that_ends_within_a_record_is_read_up_to_it(tmp_path: Path) -> None:
    record_class = wandb_record_class()
    path = tmp_path / "run-a.wandb"
    records = [record_class(), record_class()]
    for record in records:
        record.run.notes = "x" * 40_000
    write_records(path, records)
    content = path.read_bytes()
    for size in (0, 3, 7, 12, 32_768, 40_100, len(content) - 1):
        path.write_bytes(content[:size])
        expected = records[: 1 if size > 40_050 else 0]
        assert read_records(path) == expected


@pytest.mark.parametrize("kill_step", [None, 1, 3, 5])
def test_a_resumed_run_is_one_file_with_its_whole_history(
    kill_step: int | None, tmp_path: Path
) -> None:
    """The first session is interrupted, or killed around the checkpoint at step 3.

    W&B has written the steps up to that of the kill. All of them are in the run's folder.
    """
    if kill_step is None:
        tracker = open_tracker(tmp_path)
        log_steps(tracker, 1, 4)
        tracker.finish("interrupted", {"error": "Ctrl-C", "pruned_at": 4})
    else:
        killed_session(tmp_path, kill_step)
    checkpoint(tmp_path, 3)
    folder = RunFolder(tmp_path / "trials" / "0")
    for step in range(1, 6):
        folder.log(step, {"train/loss": 10.0 - step, "eval/loss": 10.0 - step})

    tracker = open_tracker(tmp_path)
    log_steps(tracker, 4, 8)
    finish(tracker)

    assert_whole(tmp_path, [1, 2, 3, 4, 5, 6, 7, 8])
    assert "pruned_at" not in wandb_summary(only_records(tmp_path))
    assert len(list((tmp_path / "wandb").glob("*run-*"))) == 1


@pytest.mark.parametrize("has_file", [True, False])
def test_steps_of_which_wandb_has_written_none_are_in_the_resumed_runs_file(
    has_file: bool, tmp_path: Path
) -> None:
    """The first session was killed before W&B wrote anything, or its file is gone.

    So it is where an earlier version has put the file into the trial's folder.
    """
    checkpoint(tmp_path, 3)
    folder = RunFolder(tmp_path / "trials" / "0")
    for step in range(1, 4):
        folder.log(step, {"train/loss": 10.0 - step, "eval/loss": 10.0 - step})
    if has_file:
        place = tmp_path / "wandb" / "offline-run-20260101_000000-abc-0"
        place.mkdir(parents=True)
        (place / "run-abc-0.wandb").write_bytes(b":W&B\xa1\xbe\x00")

    tracker = open_tracker(tmp_path)
    log_steps(tracker, 4, 5)
    finish(tracker)

    assert steps_of(only_records(tmp_path)) == [1, 2, 3, 4, 5]


def killed_session(study: Path, last_step: int) -> None:
    """A session in a process of its own, which is killed while the run is open."""
    script = (
        "import os, signal, sys, time; from pathlib import Path;"
        "sys.path[:0] = sys.argv[3:];"
        "import test_wandb_fragments as t;"
        "tracker = t.open_tracker(Path(sys.argv[1]));"
        "t.log_steps(tracker, 1, int(sys.argv[2]) + 1);"
        # W&B holds the last step back.
        "t.wait_for_step(Path(sys.argv[1]), int(sys.argv[2]));"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    here = Path(__file__).parent
    paths = [str(here), str(here.parents[1]), str(here.parents[2])]
    # Else it is served by the W&B process of the tests, which does not end with it.
    environment = {key: os.environ[key] for key in os.environ if key != "WANDB_SERVICE"}
    ended = subprocess.run(
        [sys.executable, "-c", script, str(study), str(last_step), *paths],
        env=environment,
        timeout=120,
    )
    assert ended.returncode == -signal.SIGKILL


def wait_for_step(study: Path, step: int) -> None:
    import time

    end = time.monotonic() + 60
    while step not in steps_of(read_records(only_file(study))):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_run_that_begins_anew_takes_the_place_of_what_was_logged_before(
    tmp_path: Path,
) -> None:
    tracker = open_tracker(tmp_path)
    log_steps(tracker, 0, 6)
    tracker.log_samples(6, [{"prompt": "A?"}])
    tracker.finish("failed", {"error": "out of memory", "shrunk": 1})

    tracker = open_tracker(tmp_path)
    log_steps(tracker, 1, 4)
    finish(tracker)

    assert_whole(tmp_path, [1, 2, 3, 4])
    records = only_records(tmp_path)
    assert "shrunk" not in wandb_summary(records)
    assert not any(record.HasField("artifact") for record in records)


def test_what_is_added_after_the_end_stands_in_the_same_file(tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path)
    log_steps(tracker, 1, 3)
    finish(tracker)
    folder = RunFolder(tmp_path / "trials" / "0")
    report = tmp_path / "report.html"
    report.write_text("<p>")

    add_tag(folder, "best")
    add_tag(folder, "best")
    with reopen_run(folder, uploads=True) as run:
        run.summary["test/loss"] = 0.5
        log_artifact(run, "s1-report", "report", report)
    remove_tag(folder, "first")

    assert_whole(tmp_path, [1, 2, 3])
    records = only_records(tmp_path)
    assert list(opened(records).tags) == ["best"]
    assert read_json(folder.path / TRACKER)["tags"] == ["best"]
    assert wandb_summary(records)["test/loss"] == 0.5
    (artifact,) = [record.artifact for record in records if record.HasField("artifact")]
    assert (artifact.name, artifact.run_id) == ("s1-report", "abc-0")
    (content,) = artifact.manifest.contents
    assert Path(content.local_path).read_text() == "<p>"


def test_tags_that_are_added_at_the_same_time_all_stay(tmp_path: Path) -> None:
    finish(open_tracker(tmp_path))
    folder = RunFolder(tmp_path / "trials" / "0")
    tags = [f"tag{number}" for number in range(8)]
    with ThreadPoolExecutor(len(tags)) as pool:
        list(pool.map(lambda tag: add_tag(folder, tag), tags))
    assert sorted(opened(only_records(tmp_path)).tags) == ["first", *tags]


def test_wandbs_viewer_reads_a_joined_file(tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path)
    log_steps(tracker, 1, 4)
    tracker.finish("interrupted", {})
    checkpoint(tmp_path, 3)
    tracker = open_tracker(tmp_path)
    log_steps(tracker, 4, 8)
    finish(tracker)

    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary"]
    shown = subprocess.run(
        [*command, str(only_file(tmp_path))],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    assert "t00 r=16 (abc-0)" in shown
    assert "finished (exit code 0)" in shown
    assert re.search(r"step +8\n", shown)


def test_after_an_error_nothing_is_added(tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path)
    log_steps(tracker, 1, 3)
    finish(tracker)
    before = only_file(tmp_path).read_bytes()

    def add() -> None:
        with reopen_run(RunFolder(tmp_path / "trials" / "0")) as run:
            run.summary["test/loss"] = 0.5
            raise ConnectionError

    with pytest.raises(ConnectionError):
        add()
    assert only_file(tmp_path).read_bytes() == before


def test_a_study_that_was_moved_is_added_to_where_it_is(tmp_path: Path) -> None:
    finish(open_tracker(tmp_path / "s1"))
    shutil.move(tmp_path / "s1", tmp_path / "s2")

    add_tag(RunFolder(tmp_path / "s2" / "trials" / "0"), "best")

    assert list(opened(only_records(tmp_path / "s2")).tags) == ["first", "best"]
    assert not (tmp_path / "s1").exists()


def test_a_run_whose_files_are_gone_gets_no_tag_and_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    finish(open_tracker(tmp_path))
    shutil.rmtree(tmp_path / "wandb")

    add_tag(RunFolder(tmp_path / "trials" / "0"), "best")

    (line,) = [text for text in caplog.messages if text.startswith("W&B")]
    assert "no file of run abc-0" in line


class Killed(BaseException):
    pass


def calls_of_os() -> list[tuple[Any, str]]:
    """The functions by which joining changes the disk."""
    return [
        (wandb_fragments, "_move_files"),
        (wandb_fragments, "write_records"),
        (wandb_fragments.shutil, "rmtree"),
        (Path, "unlink"),
        (Path, "rename"),
    ]


@pytest.mark.fault
def test_a_kill_at_any_change_of_the_disk_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made"
    killed_session(made, 5)
    checkpoint(made, 3)
    tracker = open_tracker(made)
    log_steps(tracker, 4, 8)
    tracker.log_samples(8, [{"prompt": "A?"}])
    with monkeypatch.context() as patch:
        # Left as they are when the process is killed right after its last step.
        patch.setattr("finetune.tracking.wandb.join_finished", lambda *_: None)
        finish(tracker)
    assert len(fragment_files(made, "abc-0")) == 2

    for count in itertools.count(1):
        study = tmp_path / str(count)
        shutil.copytree(made, study)
        with monkeypatch.context() as patch:
            remaining = _kill_at(patch, count)
            try:
                join_fragments(study, "abc-0", is_offline=True)
            except Killed:
                remaining = 0
        join_fragments(study, "abc-0", is_offline=True)
        assert_whole(study, [1, 2, 3, 4, 5, 6, 7, 8])
        records = only_records(study)
        assert sum(record.HasField("artifact") for record in records) == 1
        (row,) = [row for row in wandb_history(records) if "samples/path" in row]
        assert (only_file(study).parent / "files" / row["samples/path"]).is_file()
        if remaining:
            break
    assert count > 4, "the change of the disk were not counted"


def _kill_at(patch: pytest.MonkeyPatch, count: int) -> int:
    """Let the `count`-th change of the disk end the process before it is done."""
    numbers = itertools.count(1)

    def counted(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(numbers) == count:
                raise Killed
            return function(*arguments, **options)

        return call

    for owner, name in calls_of_os():
        patch.setattr(owner, name, counted(getattr(owner, name)))
    return 1


@pytest.mark.fault
def test_a_file_without_a_run_is_removed_as_it_would_end_a_sync(tmp_path: Path) -> None:
    finish(open_tracker(tmp_path))
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    empty = folder.with_name("offline-run-20200101_000000-abc-0")
    empty.mkdir()
    (empty / "run-abc-0.wandb").write_bytes(b"")

    file = join_fragments(tmp_path, "abc-0", is_offline=True)

    assert file == folder / "run-abc-0.wandb"
    assert not empty.exists()


def test_all_runs_of_a_study_stand_in_its_folder_without_links(tmp_path: Path) -> None:
    for number in range(2):
        finish(open_tracker(tmp_path, number=number))
    names = sorted(entry.name for entry in (tmp_path / "wandb").iterdir())
    assert [name.rpartition("-abc-")[2] for name in names] == ["0", "1"]
    assert not list((tmp_path / "trials").glob("*/wandb"))


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("eval/loss", {"eval/loss": "min", "eval/accuracy": "max", "objective": "min"}),
        ("eval/accuracy", {"eval/accuracy": "max", "objective": "max"}),
        ("eval/exact_match", {"eval/exact_match": "max", "objective": "max"}),
        ("eval/bits_per_byte", {"eval/bits_per_byte": "min", "objective": "min"}),
    ],
)
def test_wandb_knows_the_direction_of_each_metric(
    objective: str, expected: dict[str, str], tmp_path: Path
) -> None:
    scores = "evaluation.metrics=[exact_match,json_valid]"
    finish(open_tracker(tmp_path, f"objective={objective}", scores))
    told = {}
    for record in only_records(tmp_path):
        if record.HasField("metric"):
            summary = record.metric.summary
            told[record.metric.name] = "max" if summary.max else "min"
            assert summary.last
            assert summary.max != summary.min
    assert expected.items() <= told.items()
    assert told["eval/json_valid"] == "max"
