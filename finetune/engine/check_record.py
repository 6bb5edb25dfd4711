"""Where the cache records what was found out about a base, so that it is not tried out again."""

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from finetune.files.cache import cache_folder

LIBRARIES = ("torch", "transformers", "peft", "trl")
"""A new version of any of them has records of its own."""


def record_file(kind: str, identity: Sequence[object]) -> Path:
    """Return the file of a record.

    Args:
        kind: The folder in the cache.
        identity: All that the result depends on, but for the versions of the libraries. Its `repr`
            is the same in each process.
    """
    versions = [version(library) for library in LIBRARIES]
    digest = hashlib.sha256(repr([*identity, versions]).encode())
    return cache_folder() / kind / f"{digest.hexdigest()[:32]}.json"
