"""The cache folder of packaged models, rows and tokens."""

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from finetune.files.atomic import create_folder
from finetune.files.lock import file_lock

Content = TypeVar("Content")

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return FINETUNE_CACHE if it is set, else `finetune` in XDG_CACHE_HOME or `~/.cache`."""
    folder = os.environ.get("FINETUNE_CACHE")
    if folder:
        return Path(folder)
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user_cache) / "finetune"


def load_cached(
    kind: str,
    key: str,
    create: Callable[[Path], None],
    load: Callable[[Path], Content],
) -> Content:
    """Return the content of a folder of the cache, which is created if it is missing or damaged.

    Of several processes one creates it, and the others wait: doing the same work at the same time
    would only take longer.

    Args:
        kind: The folder in the cache.
        key: The name of the folder in it: a hash of everything that its content depends on.
        create: Writes the content into a draft, an empty folder.
        load: Opens the content; raises an error if a file is missing or damaged.
    """
    folder = cache_folder() / kind / key
    if folder.exists():
        # A folder that can't be loaded is created anew below, under the lock.
        with contextlib.suppress(Exception):
            return load(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock_where_possible(folder.with_name(f".{key}.lock")):
        if folder.exists():
            try:
                return load(folder)
            except Exception as error:  # each library has its errors for damaged files
                reason = f"{type(error).__name__}: {error}"
                log.warning(
                    "cache: %s is damaged and created anew (%s)", folder, reason
                )
                shutil.rmtree(folder)
        with create_folder(folder) as draft:
            create(draft)
    return load(folder)


@contextlib.contextmanager
def _lock_where_possible(path: Path) -> Iterator[None]:
    """Hold a lock, but for a file system without locks: then several may do the same work."""
    lock = contextlib.ExitStack()
    with contextlib.suppress(OSError):
        lock.enter_context(file_lock(path))
    with lock:
        yield
