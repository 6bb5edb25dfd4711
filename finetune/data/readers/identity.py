"""What tells whether a file is the one that was read before."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from finetune.data.readers.file import DataFile

_VERSION_FIELDS = (
    "ETag",
    "etag",
    "md5Hash",
    "crc32c",
    "content_md5",
    "blob_id",
    "xet_hash",
)
"""What object storages call a hash of a file's content."""


def file_identity(file: DataFile) -> str | None:
    """Return a hash of a file's content, or of all files of a folder; None if it is not known.

    Of a URL nothing is read: it is the hash that its storage has, None if it has none.
    """
    try:
        if file.remote:
            return _remote_identity(file.name)
        digest = hashlib.sha256()
        for path in _files(file.path):
            with path.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{path.name} {content}\n".encode())
        return digest.hexdigest()
    except OSError:
        return None  # the reader says what is wrong with it


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    for child in sorted(path.iterdir()):
        if child.is_file():
            yield child


def _remote_identity(url: str) -> str | None:
    import fsspec

    try:
        storage, path = fsspec.core.url_to_fs(url)
        information = storage.info(path)
    except Exception:  # each storage has its exceptions; the reader says what is wrong
        return None
    versions = [
        str(information[name]) for name in _VERSION_FIELDS if information.get(name)
    ]
    return " ".join(versions) or None
