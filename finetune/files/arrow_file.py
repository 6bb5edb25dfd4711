"""Read Arrow files through a memory map, with bounded memory."""

import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy
    import pyarrow

RELEASE_BYTES = 256 * 2**20
"""So many bytes are read before their pages are given back to the system."""


class ArrowFile:
    """An Arrow IPC file, memory-mapped.

    Pages that were read count as memory of this process. They are given back after every
    `RELEASE_BYTES` bytes; the system still keeps them in its cache.

    Args:
        path: The file.

    Raises:
        OSError: The file can't be read.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow

        with path.open("rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._read_bytes = 0
        buffer = pyarrow.py_buffer(self._map)
        self.table: pyarrow.Table = pyarrow.ipc.open_file(buffer).read_all()

    def count_read(self, size: int) -> None:
        """Say that so many bytes of the table were read.

        Args:
            size: Bytes.
        """
        self._read_bytes += size
        if self._read_bytes >= RELEASE_BYTES:
            self.release()

    def release(self) -> None:
        """Give the pages that were read back to the system; they can be read again."""
        self._map.madvise(mmap.MADV_DONTNEED)
        self._read_bytes = 0


def integers(array: "pyarrow.Array") -> "numpy.ndarray[Any, numpy.dtype[Any]]":
    """Return an Arrow array of integers, none of them missing, as a NumPy array on its memory."""
    import numpy

    # Not by the array's own `to_numpy`, which imports pandas: half a second at the start of a run.
    return numpy.from_dlpack(array)
