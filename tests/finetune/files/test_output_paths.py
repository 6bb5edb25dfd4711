"""What a command writes is refused before its work, if it can't be written after it."""

import os
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import ConfigError
from finetune.files.atomic import create_new_folder
from finetune.files.output_paths import new_folder, output_file


def test_new_and_empty_folders_are_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new", "several/new/ones", "wé ws/ü"):
        assert new_folder("--to", tmp_path / name) == tmp_path / name
    monkeypatch.setenv("HOME", str(tmp_path))
    assert new_folder("--to", "~/new") == tmp_path / "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def test_a_link_stands_for_the_folder_it_names(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        link = tmp_path / f"to {name}"
        link.symlink_to(tmp_path / name)
        folder = new_folder("--to", link)
        with create_new_folder(folder) as draft:
            (draft / "file").touch()
        assert [path.name for path in link.iterdir()] == ["file"]


@pytest.mark.parametrize("folder", [None, 3, "", [], b"new"])
def test_what_names_no_folder_is_refused(folder: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"^path=.*: must be a new or an empty folder"
    ):
        new_folder("path", folder)


def test_an_empty_volume_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only root may mount one.
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    with pytest.raises(ConfigError, match="is a mount point"):
        new_folder("--to", tmp_path)
    assert new_folder("--to", tmp_path / "new") == tmp_path / "new"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file", "exists already; must be a new or an empty folder"),
        ("full", "exists already; must be a new or an empty folder"),
        ("file/new", "can't be created: .*file is a file"),
        ("file/new/one", "can't be created: .*file is a file"),
        ("closed/new", "can't be created: .*closed can't be written to"),
        ("", "must be a new or an empty folder"),
        (".", "must be a new or an empty folder"),
    ],
)
def test_a_folder_that_can_not_be_created_is_refused(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("content")
    (tmp_path / "full" / "inside").mkdir(parents=True)
    (tmp_path / "closed").mkdir()
    monkeypatch.chdir(tmp_path)
    # Root may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "closed")
    with pytest.raises(ConfigError, match=f"^--to={name}: {reason}"):
        new_folder("--to", name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("folder", "must be a file"),
        ("", "must be a file"),
        ("missing/answers.jsonl", "can't be created: there is no folder .*missing"),
        ("file/answers.jsonl", "can't be created: .*file is a file"),
        ("closed/answers.jsonl", "can't be created: .*closed can't be written to"),
    ],
)
def test_a_file_that_can_not_be_written_is_refused(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("content")
    (tmp_path / "folder").mkdir()
    (tmp_path / "closed").mkdir()
    monkeypatch.chdir(tmp_path)
    # Root may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "closed")
    with pytest.raises(ConfigError, match=f"^--answers={name}: {reason}"):
        output_file("--answers", name)
    assert output_file("--answers", "file") == Path("file")
