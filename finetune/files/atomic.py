"""Files and folders that appear at their path complete or not at all.

Each is written under a draft name in the same folder and then renamed. A draft's name begins with a
dot, so that no reader takes it for the file itself.
"""

import contextlib
import errno
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError
from finetune.json_safe import json_safe

DRAFT = ".draft."
"""Beginning of the names of draft folders that several processes may write at the same time."""


def write_text(path: Path, text: str, *, single_writer: bool = False) -> None:
    """Write a UTF-8 text file, replacing the one at `path`.

    Args:
        path: Where the file appears when it is complete.
        text: The whole content.
        single_writer: No other process writes this path at the same time, because the caller holds
            a lock. The draft then has a fixed name, and the draft of a killed process is
            overwritten by the next write.

    Raises:
        OSError: The file can't be written (disk full); the message names `path`.
    """
    # Not the process's number: another host that shares the disk may have the same one.
    suffix = "draft" if single_writer else os.urandom(4).hex()
    draft = path.with_name(f".{path.name}.{suffix}")
    try:
        with name_file_in_errors(path):
            draft.write_text(text, encoding="utf-8")
            # A rename within one folder is atomic: a reader sees the old file or the new one.
            os.replace(draft, path)
    finally:
        # Left only after an error.
        draft.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """Write a JSON file, replacing the one at `path`.

    NaN and infinities become null, because JSON has no such numbers.

    Raises:
        OSError: The file can't be written (disk full); the message names `path`.
    """
    text = json.dumps(json_safe(content), indent=2, ensure_ascii=False)
    write_text(path, text + "\n")


def read_json(path: Path) -> Any:
    """Return the object in a JSON file, None if there is no such file.

    Raises:
        ConfigError: The file holds no JSON object: something else has written it.
    """
    return _read(path, dict, "object")


def read_json_list(path: Path) -> list[Any]:
    """Return the list in a JSON file, empty if there is no such file.

    Raises:
        ConfigError: The file holds no JSON list: something else has written it.
    """
    values: list[Any] | None = _read(path, list, "list")
    return values or []


def _read(path: Path, kind: type, name: str) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(
            f"{path}: the file is damaged, it is no JSON: {error}"
        ) from None
    if not isinstance(content, kind):
        raise ConfigError(f"{path}: the file is damaged, it holds no JSON {name}")
    return content


@contextlib.contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Write a folder that replaces the one at `path` when the block ends without an error.

    After an error nothing is left of it.

    For one writer at a time: the draft has a fixed name, and what a killed process left there is
    removed first.

    Yields:
        The draft's path. The folder does not exist yet; the block creates it.
    """
    draft = path.with_name(f".{path.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        yield draft
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    # Removed first: a folder can't be renamed onto one that has files.
    shutil.rmtree(path, ignore_errors=True)
    draft.rename(path)


@contextlib.contextmanager
def create_folder(path: Path) -> Iterator[Path]:
    """Write a folder that several processes may create at the same time.

    The first to finish provides the folder, and the later ones discard their drafts: all must write
    the same content.

    Yields:
        The draft's path, an empty folder.
    """
    with draft_folder(path.parent, path.name) as draft:
        yield draft
        publish_folder(draft, path)


@contextlib.contextmanager
def create_new_folder(path: Path) -> Iterator[Path]:
    """Write a folder that does not exist yet, or is empty.

    Yields:
        The draft's path, an empty folder.

    Raises:
        ConfigError: When the block ends, another process has written the folder; it is left as it
            is.
    """
    with draft_folder(path.parent, path.name) as draft:
        yield draft
        try:
            # An empty folder is replaced.
            draft.rename(path)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            reason = "another process has written this folder meanwhile"
            raise ConfigError(f"{path}: {reason}") from error


@contextlib.contextmanager
def draft_folder(parent: Path, name: str) -> Iterator[Path]:
    """Create a folder to write a draft in; it is removed if it is still there at the end.

    Drafts that killed processes of this machine left in the parent folder are removed. Those of
    other machines stay: a cache may be on a shared disk, and whether their processes are alive
    can't be seen from here.

    Args:
        parent: Where the draft is created.
        name: Part of the draft's name.

    Yields:
        The draft's path.

    Raises:
        OSError: The block's, with the parent folder if it names no file (disk full).
    """
    machine = platform.node().partition(".")[0]
    draft = parent / f"{DRAFT}{name}.{machine}.{os.getpid()}"
    for existing_draft in parent.glob(f"{DRAFT}*.{machine}.*"):
        writer = int(existing_draft.suffix[1:])
        # A draft of this process's own number is that of a dead process, whose number it got.
        if existing_draft == draft or not _is_alive(writer):
            shutil.rmtree(existing_draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
    except OSError as error:
        if error.filename is not None:
            raise
        # Libraries don't name the file whose disk is full.
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(error.errno, reason, str(parent)) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def publish_folder(draft: Path, path: Path) -> None:
    """Rename a draft to its path, unless another process was first."""
    try:
        os.rename(draft, path)
    except OSError:
        # Where the folder exists, another process was first.
        if not path.exists():
            raise


def _is_alive(process_id: int) -> bool:
    import psutil

    return bool(psutil.pid_exists(process_id))


@contextlib.contextmanager
def name_file_in_errors(path: Path) -> Iterator[None]:
    """Name the file in errors that do not name one themselves (disk full).

    Raises:
        OSError: In place of an OSError or a SafetensorError in the block, with `path` in its
            message.
    """
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    except SafetensorError as error:
        raise OSError(f"{error}: {path}") from error
