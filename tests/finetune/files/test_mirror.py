"""mirror=URL: copies of runs in another file system, and runs that go on from them."""

import logging
import os
import resource
import shutil
import signal
import threading
from pathlib import Path

import fsspec
import pytest

from finetune.errors import ConfigError
from finetune.files.mirror import Mirror
from finetune.files.run_folder import RunFolder


@pytest.fixture(params=["memory://bucket/copies", "folder"])
def mirror(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Mirror:
    """A mirror; the working directory is another folder."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    memory = fsspec.filesystem("memory")
    if memory.exists("/bucket"):
        memory.rm("/bucket", recursive=True)
    url = request.param
    return Mirror(str(tmp_path / "copies") if url == "folder" else url)


def write(folder: Path, *names: str, content: str = "x") -> None:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)


def names_in(folder: Path) -> set[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix() for path in files}


def copy(mirror: Mirror, folder: Path, *without: str) -> None:
    mirror.copy(folder, without)
    Mirror.finish()


def copy_run(mirror: Mirror, folder: Path) -> None:
    mirror.copy_run(folder)
    Mirror.finish()


def fetched(mirror: Mirror, folder: Path) -> set[str]:
    """What another machine gets, which has nothing yet."""
    os.rename(folder, folder.with_name("first machine"))
    mirror.fetch(folder)
    return names_in(folder)


def test_finished_files_come_back_and_no_other(mirror: Mirror) -> None:
    run = Path("outputs/runs/a/1")
    finished = {
        "run.json",
        ".hydra/config.yaml",
        "metrics.jsonl",
        "checkpoints/checkpoint-4/progress.json",
        "checkpoints/checkpoint-4/slot.safetensors",
    }
    write(run, *finished)
    write(run, ".lock", ".result.json.draft", "study.lock", ".adapter.draft/a.bin")
    write(run, "checkpoints/checkpoint-8/slot.safetensors")

    copy(mirror, run)

    assert fetched(mirror, run) == finished


def test_a_copy_follows_the_folder(mirror: Mirror) -> None:
    run = Path("outputs/runs/a/1")
    write(run, "run.json", "checkpoints/checkpoint-4/progress.json")
    copy(mirror, run)
    (run / "checkpoints/checkpoint-4/progress.json").unlink()
    (run / "checkpoints/checkpoint-4").rmdir()
    write(run, "checkpoints/checkpoint-8/progress.json")
    write(run, "result.json", content="second")
    copy_run(mirror, run)

    names = {"run.json", "result.json", "checkpoints/checkpoint-8/progress.json"}
    assert fetched(mirror, run) == names
    assert (run / "result.json").read_text() == "second"


def test_what_a_run_has_removed_does_not_come_back(mirror: Mirror) -> None:
    run = RunFolder("outputs/runs/a/1")
    write(run.path, "run.json", "result.json", "train.log", "adapter/a.bin")
    copy(mirror, run.path)
    run.clear()
    copy_run(mirror, run.path)
    assert fetched(mirror, run.path) == {"train.log"}


def test_copies_are_removed_without_a_copy_of_other_files(mirror: Mirror) -> None:
    run = RunFolder("outputs/runs/a/1")
    write(run.path, "run.json", "adapter/a.bin", "checkpoints/checkpoint-4/a.bin")
    write(run.path, "result.json", content="newer")
    write(run.path, "checkpoints/checkpoint-4/progress.json")
    copy_run(mirror, run.path)
    write(run.path, "result.json", content="of an older state")
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoints)

    mirror.remove_copies(run.path, ["adapter", "checkpoints"])
    Mirror.finish()

    assert fetched(mirror, run.path) == {"run.json", "result.json"}
    assert (run.path / "result.json").read_text() == "newer"


def test_the_files_of_a_run_are_copied_and_fetched_without_others(
    mirror: Mirror,
) -> None:
    run = RunFolder("r")
    of_run = {"run.json", "train.log", ".hydra/config.yaml", "tracker.json"}
    write(run.path, *of_run, "data.jsonl", "a/1/run.json")
    copy_run(mirror, run.path)
    copy_run(mirror, run.path / "a/1")
    shutil.rmtree(run.path)
    mirror.fetch_run(run)
    assert names_in(run.path) == of_run | {".lock"}
    mirror.fetch(run.path)
    assert names_in(run.path) == of_run | {".lock", "a/1/run.json"}


def test_a_folder_of_runs_is_no_run(mirror: Mirror) -> None:
    write(Path("r/a"), "run.json")
    copy_run(mirror, Path("r/a"))
    write(Path("r"), "train.log")
    copy(mirror, Path("r"))
    os.rename("r", "first machine")
    mirror.fetch_run(RunFolder("r"))
    assert not Path("r").exists()


def test_a_folder_with_a_run_and_others_below_removes_its_files_only(
    mirror: Mirror,
) -> None:
    for run in (Path("r"), Path("r/other")):
        write(run, "run.json", "result.json")
    copy(mirror, Path("r"))
    (Path("r") / "result.json").unlink()
    (Path("r/other") / "run.json").unlink()
    copy_run(mirror, Path("r"))
    assert fetched(mirror, Path("r")) == {
        "run.json",
        "other/run.json",
        "other/result.json",
    }


def test_a_disk_that_is_gone_has_removed_nothing(mirror: Mirror) -> None:
    run = Path("outputs/runs/a/1")
    write(run, "run.json")
    copy_run(mirror, run)
    os.rename(run, run.with_name("gone"))
    copy_run(mirror, run)
    mirror.fetch(run)
    assert names_in(run) == {"run.json"}


def test_a_fetched_run_is_not_mixed_with_an_older_state(mirror: Mirror) -> None:
    run = RunFolder("outputs/runs/a/1")
    newer = {"run.json", "metrics.jsonl", "checkpoints/checkpoint-8/progress.json"}
    write(run.path, *newer, content="newer")
    copy_run(mirror, run.path)
    os.rename(run.path, run.path.with_name("first machine"))
    write(run.path, "run.json", "checkpoints/checkpoint-4/progress.json")
    write(run.path, "metrics.jsonl", "train.log", content="older")

    mirror.fetch(run.path.parent)
    assert (run.path / "metrics.jsonl").read_text() == "older"
    assert not (run.checkpoints / "checkpoint-8").exists()

    mirror.fetch_run(run)
    assert names_in(run.path) == newer | {"train.log", ".lock"}
    assert (run.path / "metrics.jsonl").read_text() == "newer"


def test_folders_outside_the_working_directory_have_copies_of_their_own(
    mirror: Mirror, tmp_path: Path
) -> None:
    for study in ("s1", "s2"):
        write(tmp_path / "scratch" / study / "trials/0", "run.json", content=study)
        copy_run(mirror, tmp_path / "scratch" / study / "trials/0")
    trial = tmp_path / "scratch" / "s1" / "trials" / "0"
    # As a user may write it.
    written = Path("..") / "scratch" / "s1" / "trials" / "0"
    for folder in (trial, written):
        (trial / "run.json").unlink()
        mirror.fetch(folder)
        assert (trial / "run.json").read_text() == "s1"


def test_no_thread_is_left_behind(mirror: Mirror) -> None:
    write(Path("run"), "run.json")
    copy(mirror, Path("run"))
    assert not [t for t in threading.enumerate() if t.name.startswith("mirror")]
    # Copies can go on.
    write(Path("run"), "result.json")
    copy(mirror, Path("run"))
    assert fetched(mirror, Path("run")) == {"run.json", "result.json"}


def test_a_journal_replaces_none_that_it_does_not_continue(
    mirror: Mirror, caplog: pytest.LogCaptureFixture
) -> None:
    study = Path("outputs/sweeps/s1")
    journal = study / "study.journal"
    for content in ("1\n2\n", "1\n2\n3\n", "1\n2\n"):
        journal.unlink(missing_ok=True)
        write(study, journal.name, content=content)
        copy(mirror, study)
    assert mirror.read(journal) == b"1\n2\n3\n"
    assert not caplog.messages

    write(study, journal.name, content="1\n2\n4\n")
    write(study, "answer.json", "best/run.json", "trials/0/run.json")
    copy(mirror, study)
    copy_run(mirror, study.absolute() / "trials" / "0")
    copy(mirror, study)
    assert mirror.read(journal) == b"1\n2\n3\n"
    for name in ("answer.json", "best/run.json", "trials/0/run.json"):
        assert not mirror.read(study / name)
    (line,) = caplog.messages
    assert "another machine has gone on with the study there" in line
    assert line.endswith("this command copies nothing more of it")


def test_what_is_here_stays(mirror: Mirror) -> None:
    study = Path("outputs/sweeps/s1")
    write(study, "study.json", "answer.json", content="old")
    copy(mirror, study)
    (study / "study.json").unlink()
    write(study, "answer.json", content="newer")

    mirror.fetch(study)

    assert (study / "study.json").read_text() == "old"
    assert (study / "answer.json").read_text() == "newer"


def test_a_journal_ends_with_a_complete_line(mirror: Mirror) -> None:
    study = Path("outputs/sweeps/s1")
    write(study, "study.journal", content='{"op": 1}\n{"op": 2}\n{"o')
    write(study, "trials/0/result.json")

    copy(mirror, study, "trials")

    assert fetched(mirror, study) == {"study.journal"}
    assert (study / "study.journal").read_text() == '{"op": 1}\n{"op": 2}\n'


@pytest.mark.parametrize("name", ["study.journal", "result.json"])
def test_a_copy_that_fails_leaves_the_earlier_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mirror, study = Mirror("copies"), tmp_path / "s"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    write(study, name, content="1\n")
    copy(mirror, study)
    write(study, name, content="1\n" * 100_000)
    # As a disk that is full.
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        copy(mirror, study)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert names_in(tmp_path / "copies") == {f"s/{name}"}
    assert mirror.read(study / name) == b"1\n"


def test_a_draft_of_a_killed_copy_is_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "copies" / "s", "study.json", ".result.json.0a1b2c3d")
    Mirror("copies").fetch(Path("s"))
    assert names_in(Path("s")) == {"study.json"}


def test_the_newest_run_of_a_name_is_known(mirror: Mirror) -> None:
    runs = Path("outputs/runs/a")
    for time in ("2026-01-02", "2026-01-10", "2026-01-09"):
        write(runs / time, "run.json")
        copy(mirror, runs / time)

    assert mirror.newest_run(runs) == runs / "2026-01-10"
    assert mirror.newest_run(runs / "2026-01-02") == runs / "2026-01-02"
    assert mirror.newest_run(Path("outputs/runs/b")) is None


def test_a_failed_copy_is_a_warning_and_the_next_one_takes_it_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("outputs/runs/a/1")
    write(run, "run.json")
    (tmp_path / "copies").write_text("no folder")
    mirror = Mirror("copies")
    with caplog.at_level(logging.WARNING):
        copy(mirror, run)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages[0].startswith(
        "mirror=copies: outputs/runs/a/1 was not copied"
    )

    (tmp_path / "copies").unlink()
    copy(mirror, run)
    assert fetched(mirror, run) == {"run.json"}


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nosuch://bucket", "must be a folder, or an address of fsspec"),
        ("oss://bucket", "nstall"),
    ],
)
def test_an_unknown_file_system_is_refused(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"^mirror={url}: .*{says}"):
        Mirror(url).check()


@pytest.mark.parametrize("url", [".", "./", "../work", "file://{work}", "{work}/"])
def test_the_working_directory_is_not_its_own_mirror(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    with pytest.raises(ConfigError, match="must not be the working directory"):
        Mirror(url.format(work=work)).check()
    Mirror("copies").check()


def test_a_mirror_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    mirror = Mirror("ftp://127.0.0.1:9/copies")
    with pytest.raises(
        ConfigError, match=r"^mirror=ftp://127\.0\.0\.1:9/copies: can't be read"
    ):
        mirror.fetch(tmp_path / "run")


def test_without_an_address_nothing_happens(tmp_path: Path) -> None:
    write(tmp_path / "run", "run.json")
    mirror = Mirror(None)
    mirror.check()
    copy(mirror, tmp_path / "run")
    mirror.fetch(tmp_path / "other")
    assert mirror.newest_run(tmp_path) is None
    assert not (tmp_path / "other").exists()
