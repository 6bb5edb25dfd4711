"""Processes that come and go while a test looks at them."""

import contextlib

import psutil


def children_with(
    words: str, parent: int | None = None, *, recursive: bool = False
) -> list[psutil.Process]:
    """Return the children of a process whose command line holds some words.

    Args:
        words: the words.
        parent: the number of the process; None: this one.
        recursive: whether the children of its children count too.
    """
    matching = []
    for child in psutil.Process(parent).children(recursive=recursive):
        # It may have ended since it was listed.
        with contextlib.suppress(psutil.NoSuchProcess):
            if words in " ".join(child.cmdline()):
                matching.append(child)
    return matching
