"""mirror=URL: copies of runs in another file system, and runs that go on from them."""

import logging
import os
from pathlib import Path

import fsspec
import pytest

from finetune.errors import ConfigError
from finetune.files.mirror import Mirror


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


def copy(mirror: Mirror, folder: Path, without: str = "") -> None:
    mirror.copy(folder, without)
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
    copy(mirror, run)

    names = {"run.json", "result.json", "checkpoints/checkpoint-8/progress.json"}
    assert fetched(mirror, run) == names
    assert (run / "result.json").read_text() == "second"


def test_what_is_here_stays(mirror: Mirror) -> None:
    run = Path("outputs/runs/a/1")
    write(run, "run.json", "metrics.jsonl", content="old")
    copy(mirror, run)
    (run / "run.json").unlink()
    write(run, "metrics.jsonl", content="newer")

    mirror.fetch(run)

    assert (run / "run.json").read_text() == "old"
    assert (run / "metrics.jsonl").read_text() == "newer"


def test_a_journal_ends_with_a_complete_line(mirror: Mirror) -> None:
    study = Path("outputs/sweeps/s1")
    write(study, "study.journal", content='{"op": 1}\n{"op": 2}\n{"o')
    write(study, "trials/0/result.json")

    copy(mirror, study, without="trials")

    assert fetched(mirror, study) == {"study.journal"}
    assert (study / "study.journal").read_text() == '{"op": 1}\n{"op": 2}\n'


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
