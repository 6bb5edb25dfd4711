"""Copies of run and study folders in another file system: the key `mirror`.

Work and locks stay on the local disk. Files are copied when a checkpoint is complete and when a run
or a trial has ended; a resumed run or study fetches what its folder lacks. Any file system of
fsspec takes the copies: s3://, gs://, a folder.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from finetune.errors import refusal
from finetune.files.atomic import draft_folder
from finetune.files.run_folder import PROGRESS

log = logging.getLogger(__name__)

KEY = "mirror"

LAST_FILES = (PROGRESS, "run.json", "result.json", "study.journal")
"""Files that say that others are there: they are copied after those."""

_copied: dict[tuple[str, Path], tuple[int, int]] = {}
"""Size and time stamp of each file when this process copied it."""


@functools.cache
def _thread() -> ThreadPoolExecutor:
    """The thread that copies while training goes on."""
    return ThreadPoolExecutor(1, thread_name_prefix="mirror")


class Mirror:
    """The copies of folders at an address. Without an address, its methods do nothing."""

    _pending: ClassVar[list["Future[None]"]] = []
    """Copies of this process that have not ended."""

    def __init__(self, url: str | None) -> None:
        """Take an address of fsspec.

        Args:
            url: A folder's copy has the same path below it as below the working directory; None:
                nothing is copied.
        """
        self._url = url.rstrip("/") if url else None

    def check(self) -> None:
        """Raise ConfigError if the file system is unknown, or its package is not installed."""
        if self._url is None:
            return
        import fsspec
        from fsspec.utils import get_protocol

        try:
            fsspec.get_filesystem_class(get_protocol(self._url))
        except ImportError as error:
            # "Please install s3fs to access S3"
            raise refusal(KEY, self._url, str(error)) from None
        except ValueError:
            allowed = (
                "must be a folder, or an address of fsspec such as s3://bucket/folder"
            )
            raise refusal(KEY, self._url, allowed) from None

    def copy(self, folder: Path, without: str = "") -> None:
        """Copy what is new in a folder, in a thread. A failure is one warning.

        Args:
            folder: A run's or a study's folder.
            without: A subfolder that is left out.
        """
        if self._url is None:
            return
        self._pending[:] = [future for future in self._pending if not future.done()]
        self._pending.append(_thread().submit(self._copy, folder, without))

    @classmethod
    def finish(cls) -> None:
        """Wait for all copies of this process."""
        while cls._pending:
            cls._pending.pop().result()

    def fetch(self, folder: Path) -> None:
        """Fetch the files that a folder lacks and the mirror has.

        Raises:
            ConfigError: The mirror can't be read.
        """
        if self._url is None:
            return
        with self._reading():
            self._fetch(folder)

    def newest_run(self, folder: Path) -> Path | None:
        """Return the newest run folder that the mirror has at or below a folder.

        Raises:
            ConfigError: The mirror can't be read.
        """
        if self._url is None:
            return None
        with self._reading():
            system, root = self._open(folder)
            paths = [PurePosixPath(name) for name in _relative_names(system, root)]
        # A run's folder is named by the time when it began.
        runs = sorted(path.parent for path in paths if path.name == "run.json")
        return folder / runs[-1] if runs else None

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Raise ConfigError for whatever error the file system has in the block."""
        try:
            yield
        # Each file system has its own errors.
        except Exception as error:
            reason = f"can't be read ({_reason(error)})"
            raise refusal(KEY, self._url, reason) from error

    def _open(self, folder: Path) -> tuple[Any, str]:
        """Return the file system, and where it has the copy of a folder."""
        import fsspec

        system, root = fsspec.core.url_to_fs(f"{self._url}/{_name(folder)}")
        return system, root

    def _copy(self, folder: Path, without: str) -> None:
        try:
            system, root = self._open(folder)
            new = dict(self._new_files(folder, without))
            for name in sorted(new, key=_vouches):
                self._put(system, f"{root}/{name}", new[name])
            _remove_old_checkpoints(system, root, folder)
        except Exception as error:
            log.warning(
                "%s=%s: %s was not copied (%s); the next copy takes it along",
                KEY,
                self._url,
                _name(folder),
                _reason(error),
            )

    def _new_files(self, folder: Path, without: str) -> Iterator[tuple[str, Path]]:
        """Yield names and paths of finished files that have changed since they were copied."""
        for path in _finished_files(folder):
            name = path.relative_to(folder).as_posix()
            if without and name.startswith(f"{without}/"):
                continue
            if _copied.get((str(self._url), path)) != _state(path):
                yield name, path

    def _put(self, system: Any, target: str, path: Path) -> None:
        """Copy a file. It may be gone: a checkpoint is removed when the next one is complete."""
        with contextlib.suppress(FileNotFoundError):
            state = _state(path)
            _put_file(system, path, target)
            _copied[str(self._url), path] = state

    def _fetch(self, folder: Path) -> None:
        system, root = self._open(folder)
        missing = [
            name
            for name in _relative_names(system, root)
            if not (folder / name).exists()
        ]
        if not missing:
            return
        folder.mkdir(parents=True, exist_ok=True)
        with draft_folder(folder, ".mirror") as draft:
            for name in missing:
                target = draft / name
                target.parent.mkdir(parents=True, exist_ok=True)
                system.get_file(f"{root}/{name}", str(target))
            for name in sorted(missing, key=_vouches):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(draft / name, folder / name)
        log.info("%s: %d files fetched from the mirror", _name(folder), len(missing))


def _name(folder: Path) -> str:
    """Return a folder's path from the working directory; elsewhere its last name."""
    path = folder.absolute()
    with contextlib.suppress(ValueError):
        return path.relative_to(Path.cwd()).as_posix()
    return path.name


def _vouches(name: str) -> bool:
    """Return whether a file says that others are there; as a sorting key, such files come last."""
    return name.endswith(LAST_FILES)


def _finished_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder, without locks, drafts and incomplete checkpoints."""
    for root, names, files in os.walk(folder):
        path = Path(root)
        if path.name.startswith("checkpoint-") and PROGRESS not in files:
            names.clear()
            continue
        names[:] = [name for name in names if name == ".hydra" or name[0] != "."]
        for file in files:
            is_link = (path / file).is_symlink()
            if file[0] != "." and not file.endswith(".lock") and not is_link:
                yield path / file


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _put_file(system: Any, path: Path, target: str) -> None:
    """Copy a file; of a journal, which is being written, the complete lines."""
    system.makedirs(target.rpartition("/")[0], exist_ok=True)
    if path.suffix == ".journal":
        content = path.read_bytes()
        system.pipe_file(target, content[: content.rfind(b"\n") + 1])
    else:
        system.put_file(str(path), target)


def _relative_names(system: Any, root: str) -> list[str]:
    """Return the names of all files below a folder of the mirror; none if it does not exist."""
    # Another process may have changed them.
    system.invalidate_cache()
    try:
        paths: Iterable[str] = system.find(root)
    except FileNotFoundError:
        return []
    prefix = f"{root.rstrip('/')}/"
    return [path.removeprefix(prefix) for path in paths if path.startswith(prefix)]


def _remove_old_checkpoints(system: Any, root: str, folder: Path) -> None:
    """Remove the copies of checkpoints that the run has removed."""
    checkpoints = f"{root}/checkpoints"
    for name in _relative_names(system, checkpoints):
        checkpoint = name.partition("/")[0]
        if not (folder / "checkpoints" / checkpoint).exists():
            system.rm_file(f"{checkpoints}/{name}")


def _reason(error: Exception) -> str:
    """Return an error's first line."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
