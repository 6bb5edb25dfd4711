"""Files of a mirror: which ones are copied, in which order, and how one is written and read."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from finetune.files.run_folder import HYDRA_FILES, PROGRESS, TRACKER_FILES, RunFolder

LAST_FILES = (PROGRESS, "result.json", "run.json", "train.log", ".journal")
"""Ends of the names of files that say that others are there: they come after those, in this order.
"""


def complete_lines(content: bytes) -> bytes:
    """Return a journal without the incomplete last line of a writer that was killed, or writes."""
    return content[: content.rfind(b"\n") + 1]


def file_order(name: str) -> int:
    """Return a sorting key by which files that say that others are there come last."""
    for position, end in enumerate(LAST_FILES, start=1):
        if name.endswith(end):
            return position
    return 0


def is_run(name: str) -> bool:
    """Return whether a file shows that its folder is a run's."""
    return PurePosixPath(name).name == "run.json"


def names_of_run(folder: Path) -> set[str]:
    """Return the names in a run's folder that are the run's: others may be below it too."""
    return RunFolder(folder).names | HYDRA_FILES | TRACKER_FILES


def finished_files(folder: Path, accepts: Callable[[str], bool]) -> Iterator[Path]:
    """Yield the files of a folder, without locks, drafts and incomplete checkpoints.

    Args:
        folder: The folder.
        accepts: Whether a name in it counts.
    """
    for root, names, files in os.walk(folder):
        path = Path(root)
        if path.name.startswith("checkpoint-") and PROGRESS not in files:
            names.clear()
            continue
        names[:] = [name for name in names if name == ".hydra" or name[0] != "."]
        if path == folder:
            names[:] = filter(accepts, names)
            files = list(filter(accepts, files))
        for file in files:
            is_link = (path / file).is_symlink()
            if file[0] != "." and not file.endswith(".lock") and not is_link:
                yield path / file


def file_state(path: Path) -> tuple[int, int]:
    """Return size in bytes and time stamp of a file, which change when it is written."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


class GoneOnElsewhere(Exception):
    """Another machine has gone on with the study."""


def is_journal(name: str) -> bool:
    """Return whether a file is a study's journal."""
    return name.endswith(".journal")


def put_file(system: Any, path: Path, target: str) -> None:
    """Copy a file; a journal, which only grows, never replaces one that it does not continue.

    Raises:
        GoneOnElsewhere: Another machine has gone on with the journal.
    """
    system.makedirs(target.rpartition("/")[0], exist_ok=True)
    if not is_journal(path.name):
        with _complete(system, target) as draft:
            system.put_file(str(path), draft)
        return
    content = continued_content(system, path, target)
    if content is not None:
        with _complete(system, target) as draft:
            system.pipe_file(draft, content)


def continued_content(system: Any, path: Path, target: str) -> bytes | None:
    """Return a journal's complete lines; None if its copy has them and more.

    Raises:
        GoneOnElsewhere: The journal does not continue its copy.
    """
    copied = complete_lines(read_file(system, target))
    content = complete_lines(path.read_bytes())
    if content.startswith(copied):
        return content
    # Another process of this machine may have copied more meanwhile.
    if copied.startswith(content):
        return None
    raise GoneOnElsewhere("another machine has gone on with the study there")


@contextlib.contextmanager
def _complete(system: Any, target: str) -> Iterator[str]:
    """Let a file appear at its path only when it is complete. Object stores do so by themselves.

    Yields:
        Where to write it.
    """
    from fsspec.implementations.local import LocalFileSystem

    if not isinstance(system, LocalFileSystem):
        yield target
        return
    path = Path(target)
    draft = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        yield str(draft)
        os.replace(draft, path)
    finally:
        # Left only after an error.
        draft.unlink(missing_ok=True)


def read_file(system: Any, target: str) -> bytes:
    """Return a file's content; nothing if it does not exist."""
    system.invalidate_cache()
    try:
        content: bytes = system.cat_file(target)
    except FileNotFoundError:
        return b""
    return content


def relative_names(system: Any, root: str) -> list[str]:
    """Return the names of all files below a folder of the mirror; none if it does not exist."""
    # Another process may have changed them.
    system.invalidate_cache()
    try:
        paths: Iterable[str] = system.find(root)
    except FileNotFoundError:
        return []
    prefix = f"{root.rstrip('/')}/"
    names = [path.removeprefix(prefix) for path in paths if path.startswith(prefix)]
    # A kill leaves drafts.
    return [name for name in names if PurePosixPath(name).name[0] != "."]
