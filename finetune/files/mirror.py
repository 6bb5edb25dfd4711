"""Copies of run and study folders in another file system: the key `mirror`.

Work and locks stay on the local disk. Files are copied when a checkpoint is complete and when a run
or a trial has ended; a resumed run or study fetches what is not here. Any file system of fsspec
takes the copies: s3://, gs://, a folder.
"""

import contextlib
import functools
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from finetune.errors import refusal
from finetune.files.atomic import draft_folder
from finetune.files.mirrored_files import (
    GoneOnElsewhere,
    continued_content,
    file_order,
    file_state,
    finished_files,
    is_journal,
    is_run,
    names_of_run,
    put_file,
    read_file,
    relative_names,
)
from finetune.files.run_folder import RunFolder

log = logging.getLogger(__name__)

KEY = "mirror"
"""The config key of its address."""

_copied: dict[tuple[str, Path], tuple[int, int]] = {}
"""Size and time stamp of each file when this process copied it."""

_left: set[tuple[str, Path]] = set()
"""Folders of studies with which another machine has gone on: this process copies none of them."""


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
            url: A folder's copy has the same path below it as below the working directory, or as
                below the root for folders elsewhere; None: nothing is copied.
        """
        self._url = url.rstrip("/") if url else None

    @property
    def has_address(self) -> bool:
        """Whether anything is copied."""
        return self._url is not None

    def check(self) -> None:
        """Raise ConfigError where nothing can be copied.

        The file system is unknown, its package is not installed, or the working directory is its
        own mirror.
        """
        if self._url is None:
            return
        import fsspec
        from fsspec.implementations.local import LocalFileSystem
        from fsspec.utils import get_protocol

        try:
            system = fsspec.get_filesystem_class(get_protocol(self._url))
        except ImportError as error:
            # "Please install s3fs to access S3"
            raise refusal(KEY, self._url, str(error)) from None
        except ValueError:
            allowed = (
                "must be a folder, or an address of fsspec such as s3://bucket/folder"
            )
            raise refusal(KEY, self._url, allowed) from None
        if not issubclass(system, LocalFileSystem):
            return
        _, folder = fsspec.core.url_to_fs(self._url)
        if Path(folder).resolve() == Path.cwd():
            reason = "must not be the working directory itself"
            raise refusal(KEY, self._url, reason)

    def copy(self, folder: Path, without: Collection[str] = ()) -> None:
        """Copy what is new in a folder, in a thread. A failure is one warning.

        Args:
            folder: A study's folder.
            without: Names in it that are left out.
        """
        if self._url is not None:
            self._submit(self._copy, folder, without)

    def copy_run(self, folder: Path) -> None:
        """Copy what is new in a run's folder, in a thread. A failure is one warning.

        The copies of what the run has removed are removed, so that it never comes back.

        Args:
            folder: The folder of a run that this process holds, or that has ended.
        """
        if self._url is not None:
            self._submit(self._copy_run, folder, names_of_run(folder))

    def remove_copies(self, folder: Path, names: Collection[str]) -> None:
        """Remove the copies of what has been removed from a run's folder, as `copy` does.

        Args:
            folder: The run's folder.
            names: The names in it that are compared; the others' copies stay as they are.
        """
        if self._url is not None:
            self._submit(self._remove_old, folder, names)

    def _submit(
        self,
        work: Callable[[Any, str, Path, Collection[str]], None],
        folder: Path,
        names: Collection[str],
    ) -> None:
        self._pending[:] = [future for future in self._pending if not future.done()]
        self._pending.append(_thread().submit(self._work, work, folder, names))

    @classmethod
    def finish(cls) -> None:
        """Wait for all copies of this process, and end their thread."""
        while cls._pending:
            cls._pending.pop().result()
        # No thread stays behind in a user's process.
        _thread().shutdown()
        _thread.cache_clear()

    def fetch(
        self,
        folder: Path,
        without: Collection[str] = (),
        replaced: Collection[str] = (),
    ) -> None:
        """Fetch the files that a folder lacks; runs in it that are here stay as they are.

        Args:
            folder: A study's folder.
            without: Names in it that are left out.
            replaced: Names in it that are removed here first, where the mirror has them.

        Raises:
            ConfigError: The mirror can't be read.
        """
        if self._url is None:
            return
        with self._reading():
            system, root = self._open(folder)
            names = [
                name
                for name in relative_names(system, root)
                if name.partition("/")[0] not in without
            ]
            older = {name.partition("/")[0] for name in names} & set(replaced)
            runs = {PurePosixPath(name).parent for name in names if is_run(name)}
            # Files of an older and of a newer state of a run would not fit together.
            here = [f"{run}/" for run in runs if (folder / run / "run.json").exists()]
            missing = [
                name
                for name in names
                if name.partition("/")[0] in older
                or not (name.startswith(tuple(here)) or (folder / name).exists())
            ]
            if not missing:
                return
            with self._downloaded(system, root, missing, folder) as draft:
                for name in older:
                    _remove(folder / name)
                self._move(draft, missing, folder)

    def fetch_run(self, folder: RunFolder) -> None:
        """Replace a run by its copy, if the mirror has one.

        Raises:
            ConfigError: The mirror can't be read.
            FolderHeld: Another process holds the folder.
        """
        if self._url is None:
            return
        with self._reading():
            system, root = self._open(folder.path)
            of_run = names_of_run(folder.path)
            names = [
                name
                for name in relative_names(system, root)
                if name.partition("/")[0] in of_run
            ]
        if not {folder.identity.name, folder.result.name} & set(names):
            return
        with (
            folder.locked(),
            self._reading(),
            self._downloaded(system, root, names, folder.path) as draft,
        ):
            folder.clear()
            self._move(draft, names, folder.path)

    def read(self, path: Path) -> bytes:
        """Return the copy of a file; nothing if there is none.

        Raises:
            ConfigError: The mirror can't be read.
        """
        if self._url is None:
            return b""
        with self._reading():
            system, target = self._open(path)
            return read_file(system, target)

    def newest_run(self, folder: Path) -> Path | None:
        """Return the newest run folder that the mirror has at or below a folder.

        Raises:
            ConfigError: The mirror can't be read.
        """
        if self._url is None:
            return None
        with self._reading():
            system, root = self._open(folder)
            paths = [PurePosixPath(name) for name in relative_names(system, root)]
        # A run's folder is named by the time when it began.
        runs = sorted(path.parent for path in paths if is_run(path.name))
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

    def _work(
        self,
        work: Callable[[Any, str, Path, Collection[str]], None],
        folder: Path,
        names: Collection[str],
    ) -> None:
        """Do the thread's work on a folder. A failure is one warning."""
        path = Path(os.path.abspath(folder))
        # A trial's folder is in its study's.
        if any((str(self._url), each) in _left for each in (path, *path.parents)):
            return
        try:
            work(*self._open(folder), folder, names)
        except GoneOnElsewhere as error:
            _left.add((str(self._url), path))
            log.warning(
                "%s=%s: %s was not copied (%s); this command copies nothing more of it",
                KEY,
                self._url,
                _name(folder),
                error,
            )
        except Exception as error:
            log.warning(
                "%s=%s: %s was not copied (%s); the next copy takes it along",
                KEY,
                self._url,
                _name(folder),
                _reason(error),
            )

    def _copy(
        self, system: Any, root: str, folder: Path, without: Collection[str]
    ) -> None:
        """Copy what is new in a folder."""
        self._put_new(system, root, folder, lambda name: name not in without)

    def _put_new(
        self, system: Any, root: str, folder: Path, accepts: Callable[[str], bool]
    ) -> None:
        new = dict(self._new_files(folder, accepts))
        # Before any file: those of a study with which another machine has gone on stay.
        for name in filter(is_journal, new):
            continued_content(system, new[name], f"{root}/{name}")
        for name in sorted(new, key=file_order):
            self._put(system, f"{root}/{name}", new[name])

    def _copy_run(
        self, system: Any, root: str, folder: Path, names: Collection[str]
    ) -> None:
        """Copy what is new of these names, and then remove what a run has removed."""
        self._put_new(system, root, folder, names.__contains__)
        self._remove_old(system, root, folder, RunFolder(folder).names)

    def _new_files(
        self, folder: Path, accepts: Callable[[str], bool]
    ) -> Iterator[tuple[str, Path]]:
        """Yield names and paths of finished files that have changed since they were copied."""
        for path in finished_files(folder, accepts):
            name = path.relative_to(folder).as_posix()
            if _copied.get((str(self._url), path)) != file_state(path):
                yield name, path

    def _put(self, system: Any, target: str, path: Path) -> None:
        """Copy a file. It may be gone: a checkpoint is removed when the next one is complete."""
        with contextlib.suppress(FileNotFoundError):
            state = file_state(path)
            put_file(system, path, target)
            _copied[str(self._url), path] = state

    def _remove_old(
        self, system: Any, root: str, folder: Path, names: Collection[str]
    ) -> None:
        """Remove the copies of those names in a run's folder that the run has removed."""
        # A disk that is gone has removed nothing.
        if not folder.is_dir():
            return
        # The folders of other runs may be below this one.
        for name in relative_names(system, root):
            is_meant = name.partition("/")[0] in names
            if is_meant and not (folder / name).exists():
                system.rm_file(f"{root}/{name}")
                _copied.pop((str(self._url), folder / name), None)

    @contextlib.contextmanager
    def _downloaded(
        self, system: Any, root: str, names: Iterable[str], folder: Path
    ) -> Iterator[Path]:
        """Download files to a draft within a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        with draft_folder(folder, ".mirror") as draft:
            for name in names:
                target = draft / name
                target.parent.mkdir(parents=True, exist_ok=True)
                system.get_file(f"{root}/{name}", str(target))
            yield draft

    def _move(self, draft: Path, names: Iterable[str], folder: Path) -> None:
        """Move those of the downloaded files that a folder lacks to it."""
        missing = [name for name in names if not (folder / name).exists()]
        for name in sorted(missing, key=file_order):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(draft / name, path)
            _copied[str(self._url), path] = file_state(path)
        log.info("%s: %d files fetched from the mirror", _name(folder), len(missing))


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _name(folder: Path) -> str:
    """Return a folder's path from the working directory; elsewhere from the root."""
    # Without `..`, which would lead out of the mirror.
    path = Path(os.path.abspath(folder))
    with contextlib.suppress(ValueError):
        return path.relative_to(Path.cwd()).as_posix()
    return path.relative_to(path.anchor).as_posix()


def _reason(error: Exception) -> str:
    """Return an error's first line."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


NO_MIRROR = Mirror(None)
"""Nothing is copied."""
