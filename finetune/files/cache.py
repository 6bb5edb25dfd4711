"""The cache folder: packaged models and tokenised rows, written whole."""

import contextlib
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path


def cache_folder() -> Path:
    """Where packaged models and tokenised rows are kept; FINETUNE_CACHE moves it."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune"
    return Path(os.environ.get("FINETUNE_CACHE") or default)


@contextlib.contextmanager
def write_folder(place: Path) -> Iterator[Path]:
    """A folder to draw up a cached one in, renamed to it at the end: nobody ever sees half of it.

    Of two processes the first wins. What killed ones have left beside it is removed: a draft is named for its
    machine and its process, because others may share the cache and draw up the same just now.
    """
    machine = platform.node().partition(".")[0]
    draft = place.with_name(f"{place.name}.{machine}.{os.getpid()}")
    for left in place.parent.glob(f"*.{machine}.*"):
        if left == draft or not _is_alive(int(left.suffix[1:])):
            shutil.rmtree(left, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        try:
            os.rename(draft, place)
        except OSError:
            if not place.exists():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # another user's
    return True
