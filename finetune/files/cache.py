"""The cache folder of packaged models, rows and tokens."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from finetune.files.atomic import create_folder
from finetune.files.lock import file_lock


def cache_folder() -> Path:
    """Return FINETUNE_CACHE if it is set, else `finetune` in XDG_CACHE_HOME or `~/.cache`."""
    folder = os.environ.get("FINETUNE_CACHE")
    if folder:
        return Path(folder)
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user_cache) / "finetune"


def cached_folder(kind: str, key: str, create: Callable[[Path], None]) -> Path:
    """Return a folder of the cache, created if it is missing.

    Of several processes one creates it, and the others wait: doing the same work at the same time
    would only take longer.

    Args:
        kind: The folder in the cache.
        key: The name of the folder in it: a hash of everything that its content depends on.
        create: Writes the content into a draft, an empty folder.
    """
    folder = cache_folder() / kind / key
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock_where_possible(folder.with_name(f".{key}.lock")):
        if not folder.exists():
            with create_folder(folder) as draft:
                create(draft)
    return folder


@contextlib.contextmanager
def _lock_where_possible(path: Path) -> Iterator[None]:
    """Hold a lock, but for a file system without locks: then several may do the same work."""
    lock = contextlib.ExitStack()
    with contextlib.suppress(OSError):
        lock.enter_context(file_lock(path))
    with lock:
        yield
