"""A file of rows, on this machine or in object storage, as a stream of bytes."""

import contextlib
import gzip
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from finetune.config.data_folder import file_type, is_remote, local_path


class UnreadableError(Exception):
    """What is wrong with a file; `read_file` adds the key and the file's name."""


@dataclass(frozen=True)
class DataFile:
    """A file of rows."""

    name: str
    """Path or URL, as error messages show it."""

    @property
    def remote(self) -> bool:
        """Whether fsspec opens the file."""
        return is_remote(self.name)

    @property
    def path(self) -> Path:
        """The path of a file on this machine."""
        return local_path(self.name)

    @property
    def type(self) -> tuple[str, str]:
        """Suffix and compression, both empty for a file that is not read."""
        if not self.remote:
            return file_type(self.name)
        address = self.name.partition("::")[0]
        return file_type(
            address.partition("?")[0] if address.startswith("http") else address
        )

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the file for reading, decompressed.

        Raises:
            UnreadableError: A URL can't be opened.
            OSError: A file of this machine can't be opened.
        """
        with self._open_stored() as stored:
            if self.type[1] == ".gz":
                with gzip.open(stored) as stream:
                    yield cast(BinaryIO, stream)
            elif self.type[1] == ".zst":
                import pyarrow

                stream = pyarrow.input_stream(stored, compression="zstd")
                yield cast(BinaryIO, io.BufferedReader(stream))
            else:
                yield stored

    @contextlib.contextmanager
    def _open_stored(self) -> Iterator[BinaryIO]:
        """Open the file for reading, as it is stored."""
        if self.remote:
            with _open_remote(self.name) as stored:
                yield stored
        else:
            with open(self.path, "rb") as local:
                yield local


def _open_remote(url: str) -> BinaryIO:
    """Open a URL with fsspec.

    Raises:
        UnreadableError: There is no such file, protocol or permission, or a package is missing.
    """
    import fsspec

    try:
        stored: BinaryIO = fsspec.open(url, "rb").open()
    except FileNotFoundError:
        raise UnreadableError("there is no such file") from None
    except IsADirectoryError:
        raise UnreadableError("is a folder; name one file in it") from None
    except ImportError as error:
        reason = (
            f"{url.partition('://')[0]}:// needs another package ({first_line(error)})"
        )
        raise UnreadableError(reason) from None
    except Exception as error:  # each storage has its exceptions
        reason = f"can't be opened ({type(error).__name__}: {first_line(error)})"
        raise UnreadableError(reason) from None
    return stored


def first_line(error: Exception) -> str:
    """Return the first line of an error's text."""
    return str(error).strip().partition("\n")[0]
