"""Rows in the common form in a file on disk, so that memory does not grow with their number."""

import functools
import hashlib
import json
import operator
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from finetune.data.types import Row, canonical_text
from finetune.files.arrow_file import ArrowFile, integers
from finetune.files.atomic import write_json

if TYPE_CHECKING:
    import numpy
    import pyarrow

    Numbers = numpy.ndarray[Any, numpy.dtype[numpy.int64]]

BATCH_ROWS = 1000
"""Rows of a record batch; the last one may have fewer."""

ROWS_FILE = "rows.arrow"
SOURCES_FILE = "sources.json"


class RowSource(NamedTuple):
    """Where rows come from."""

    name: str
    """The file or data set."""
    format_name: str
    """The format of its rows."""


class RowWriter:
    """Writes the rows of a folder, which `StoredRows` reads.

    Use it as a context manager; the files are complete when its block ends.

    Args:
        folder: An existing folder.
        count: Is called with the number of rows whenever some were written.
    """

    def __init__(
        self, folder: Path, count: Callable[[int], None] = lambda _: None
    ) -> None:
        self._folder = folder
        self._count = count
        self._sources: dict[RowSource, int] = {}
        self._contents: list[str] = []
        self._source_numbers = array("i")
        self._row_numbers = array("q")
        self.groups = array("Q")
        """The `group_key` of each row (see `finetune.data.duplicates`)."""
        self._writer: pyarrow.ipc.RecordBatchFileWriter | None = None
        self._written = 0

    def append(self, row: Row, group: int = 0) -> None:
        """Add a row and the key of the group that it belongs to.

        Raises:
            TypeError: The row holds a value that JSON does not have. Nothing is added.
        """
        content = json.dumps(row, ensure_ascii=False)
        self.groups.append(group)
        source = RowSource(row.source, row.format_name)
        self._contents.append(content)
        self._source_numbers.append(
            self._sources.setdefault(source, len(self._sources))
        )
        self._row_numbers.append(row.number)
        if len(self._contents) == BATCH_ROWS:
            self._write_batch()

    def __len__(self) -> int:
        return self._written + len(self._contents)

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self._write_batch()
            write_json(self._folder / SOURCES_FILE, list(self._sources))
        if self._writer is not None:
            self._writer.close()

    def _write_batch(self) -> None:
        # Imported with the first batch: a row that is refused before it stays quick to report.
        import pyarrow

        columns = {
            "content": pyarrow.array(self._contents, pyarrow.large_string()),
            "source": pyarrow.array(self._source_numbers, pyarrow.int32()),
            "number": pyarrow.array(self._row_numbers, pyarrow.int64()),
        }
        batch = pyarrow.RecordBatch.from_pydict(columns)
        if self._writer is None:
            path = str(self._folder / ROWS_FILE)
            self._writer = pyarrow.ipc.new_file(path, batch.schema)
        self._writer.write_batch(batch)
        self._written += len(self._contents)
        self._count(len(self._contents))
        self._contents = []
        self._source_numbers = array("i")
        self._row_numbers = array("q")


class KeyDigest:
    """Computes the key of rows (see `StoredRows.key`), one row after the other."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def update(self, row: Row, text: str) -> None:
        """Add a row.

        Args:
            row: The row.
            text: Its `canonical_text`.
        """
        self._digest.update(f"{row.place} {text}\n".encode())

    @property
    def key(self) -> str:
        """16 hexadecimal digits."""
        return self._digest.hexdigest()[:16]


class StoredRows(Sequence[Row]):
    """Rows of a folder that `RowWriter` wrote, each read when it is asked for.

    Can be pickled: another process reads the same files.

    Args:
        folder: The folder.
        numbers: Which of its rows these are, in their order; a row may stand several times.
        key: Their `key`, where it is known.
    """

    def __init__(
        self, folder: Path, numbers: "Numbers", key: str | None = None
    ) -> None:
        self.folder = folder
        self.numbers = numbers
        self._key = key

    @classmethod
    def all_of(cls, folder: Path, count: int) -> "StoredRows":
        """Return all rows of a folder, of which there are `count`."""
        import numpy

        return cls(folder, numpy.arange(count))

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> "StoredRows": ...

    def __getitem__(self, index: int | slice) -> "Row | StoredRows":
        if isinstance(index, slice):
            rows = StoredRows(self.folder, self.numbers[index])
            rows._table = self._table  # opened once for all slices
            return rows
        return self.by_number(int(self.numbers[index]))

    def by_number(self, number: int) -> Row:
        """Return a row of the folder by its number, whether it is one of these rows or not."""
        batch, position = divmod(number, BATCH_ROWS)
        contents, sources, row_numbers = self._table.batches[batch]
        content: str = contents[position].as_py()
        self._table.file.count_read(len(content))
        name, format_name = self._table.sources[sources[position]]
        return Row(
            json.loads(content),
            name,
            int(row_numbers[position]),
            format_name,
        )

    def check(self) -> None:
        """Open the files, to see whether they are complete.

        Raises:
            Exception: A file is missing or damaged.
        """
        rows = self._table.file.table.num_rows
        if len(self) and self.numbers.max() >= rows:
            raise ValueError(f"{self.folder / ROWS_FILE} has {rows} rows")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type["StoredRows"], tuple[Any, ...]]:
        return StoredRows, (self.folder, self.numbers, self._key)

    def in_source_order(self) -> "StoredRows":
        """Return the rows in the order of their sources, each once."""
        import numpy

        return StoredRows(self.folder, numpy.unique(self.numbers))

    @property
    def format_names(self) -> list[str]:
        """The formats of these rows, sorted."""
        import numpy

        columns = [source_numbers for _, source_numbers, _ in self._table.batches]
        source_numbers = numpy.unique(numpy.concatenate(columns)[self.numbers])
        sources = [self._table.sources[number] for number in source_numbers]
        return sorted({source.format_name for source in sources})

    @property
    def key(self) -> str:
        """A hash of the rows and their places, by which what is computed of them is cached."""
        if self._key is None:
            digest = KeyDigest()
            for row in self:
                digest.update(row, canonical_text(row))
            self._key = digest.key
        return self._key

    @functools.cached_property
    def _table(self) -> "_Table":
        return _Table(self.folder)


class _Table:
    """The opened files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.file = ArrowFile(folder / ROWS_FILE)
        self.sources = [
            RowSource(*names)
            for names in json.loads((folder / SOURCES_FILE).read_text(encoding="utf-8"))
        ]
        # Integer columns as NumPy arrays: indexing an Arrow array makes an object for each value.
        self.batches = [
            (batch["content"], integers(batch["source"]), integers(batch["number"]))
            for batch in self.file.table.to_batches()
        ]
