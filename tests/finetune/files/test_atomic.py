"""Files and folders appear complete or not at all, and a lock ends with its holder."""

import contextlib
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from finetune.errors import ConfigError
from finetune.files.atomic import (
    create_new_folder,
    read_json,
    read_json_list,
    replace_folder,
    write_json,
    write_text,
)
from finetune.files.lock import file_lock
from finetune.files.run_folder import FolderHeld, RunFolder

HALF_A_PAIR = "\ud800"
"""A text that can't be encoded as UTF-8."""


@pytest.mark.parametrize("single_writer", [False, True])
def test_a_file_is_replaced_whole_or_stays_as_it_was(
    single_writer: bool, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    write_text(path, "first", single_writer=single_writer)
    with pytest.raises(UnicodeEncodeError):
        write_text(path, HALF_A_PAIR, single_writer=single_writer)
    assert path.read_text() == "first"
    write_text(path, "ä second", single_writer=single_writer)
    assert path.read_text(encoding="utf-8") == "ä second"
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_single_writer_overwrites_the_draft_of_a_killed_process(
    tmp_path: Path,
) -> None:
    (tmp_path / ".report.html.draft").write_text("half")
    write_text(tmp_path / "report.html", "whole", single_writer=True)
    assert os.listdir(tmp_path) == ["report.html"]


def test_writers_at_the_same_time_do_not_meet(tmp_path: Path) -> None:
    """As on two hosts that share a disk, whose processes may have the same number."""
    texts = [letter * 100_000 for letter in "abcd"]

    def write(text: str) -> None:
        for _ in range(50):
            write_text(tmp_path / "file", text)
            assert (tmp_path / "file").read_text() in texts

    with ThreadPoolExecutor(len(texts)) as pool:
        list(pool.map(write, texts))
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_json_that_is_not_finite_is_null(tmp_path: Path) -> None:
    write_json(
        tmp_path / "a.json",
        {"loss": float("nan"), "bounds": (1.0, float("inf")), 3: "ä"},
    )
    assert read_json(tmp_path / "a.json") == {
        "loss": None,
        "bounds": [1.0, None],
        "3": "ä",
    }
    assert read_json(tmp_path / "missing.json") is None


@pytest.mark.parametrize("content", [b"", b'{"half', b"\xff\xfe"])
def test_a_file_that_is_no_json_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.json: the file is damaged"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("content", [[], 3, "text", None])
def test_a_file_of_another_shape_is_named(content: object, tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", content)
    with pytest.raises(ConfigError, match=r"a\.json: .* no JSON object"):
        read_json(tmp_path / "a.json")
    write_json(tmp_path / "b.json", {})
    with pytest.raises(ConfigError, match=r"b\.json: .* no JSON list"):
        read_json_list(tmp_path / "b.json")


def test_an_error_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"missing/a\.json"):
        write_json(tmp_path / "missing" / "a.json", {})


def test_a_folder_is_replaced_only_at_the_end_of_the_block(tmp_path: Path) -> None:
    folder = tmp_path / "best"
    (tmp_path / ".best.draft" / "left by a killed process").mkdir(parents=True)
    for content in ("first", "second"):
        with contextlib.suppress(KeyboardInterrupt), replace_folder(folder) as draft:
            draft.mkdir()
            raise KeyboardInterrupt
        with replace_folder(folder) as draft:
            draft.mkdir()
            (draft / content).touch()
            assert [path.name for path in folder.glob("*")] == (
                [] if content == "first" else ["first"]
            )
        assert os.listdir(folder) == [content]
    assert os.listdir(tmp_path) == ["best"]


def write_late(folder: Path) -> None:
    """Write a new folder while another process does."""
    with create_new_folder(folder) as late:
        (late / "late").touch()
        folder.mkdir()
        (folder / "first").touch()


def test_a_new_folder_is_written_by_the_first_to_finish(tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    machine = platform.node().partition(".")[0]
    other = tmp_path / f"backup.{machine}.99999999"  # no draft, whatever its name says
    other.mkdir()
    with pytest.raises(ConfigError, match="merged: another process has written"):
        write_late(folder)
    assert os.listdir(folder) == ["first"]
    assert sorted(os.listdir(tmp_path)) == sorted([other.name, "merged"])


HOLDER = """
import sys, time
from pathlib import Path
from finetune.files.lock import file_lock
from finetune.files.run_folder import RunFolder
path = Path(sys.argv[2])
with file_lock(path / ".lock") if sys.argv[1] == "lock" else RunFolder(path).locked():
    print("held", flush=True)
    time.sleep(60)
"""


def take_lock(folder: Path) -> None:
    with file_lock(folder / ".lock", wait=False):
        pass


def take_run_folder(folder: Path) -> None:
    with RunFolder(folder).locked():
        pass


@pytest.mark.parametrize(
    ("kind", "take", "refusal"),
    [("lock", take_lock, BlockingIOError), ("run", take_run_folder, FolderHeld)],
)
def test_a_lock_ends_when_its_holder_is_killed(
    kind: str, take: Callable[[Path], None], refusal: type[Exception], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", HOLDER, kind, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(refusal):
            take(tmp_path)
        holder.send_signal(signal.SIGKILL)
    take(tmp_path)


def test_a_run_folder_is_locked_again_inside_its_own_block_and_by_no_second_object(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        with folder.locked():
            pass
        with pytest.raises(
            FolderHeld, match="another process is training in this folder"
        ):
            take_run_folder(folder.path)
    take_run_folder(folder.path)


def test_an_error_in_the_block_passes_through_and_frees_the_lock(
    tmp_path: Path,
) -> None:
    with pytest.raises(BlockingIOError, match="mine"), RunFolder(tmp_path).locked():
        raise BlockingIOError("mine")
    take_run_folder(tmp_path)
