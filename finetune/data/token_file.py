"""Tokenised rows in a file on disk, so that memory does not grow with their number."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from finetune.data.token_report import TokenReport
from finetune.files.arrow_file import ArrowFile, integers
from finetune.files.atomic import read_json, write_json

if TYPE_CHECKING:
    import numpy
    import pyarrow
    from datasets import Dataset

    Numbers = numpy.ndarray[Any, numpy.dtype[Any]]

TOKENS_FILE = "tokens.arrow"
ORDER_FILE = "order.npy"
REPORT_FILE = "report.json"

EXAMPLE_COLUMNS = ("input_ids", "labels", "seq_lengths")
"""What training reads of an example; `seq_lengths` is there with packing only."""

Example = dict[str, list[int]]


class Tokens(Sequence[Example]):
    """Tokenised rows, each read when it is asked for.

    An example has `input_ids` and `labels`; a packed sequence also `seq_lengths`.

    Args:
        file: Holds each example once, in the order of the rows' sources; None: there are none.
        order: The examples in the order of the rows, by their numbers in the file.
        report: What became of the rows.
        key: A hash of the examples.
    """

    def __init__(
        self, file: ArrowFile | None, order: "Numbers", report: TokenReport, key: str
    ) -> None:
        self._file = file
        self._order = order
        self._key = key
        self.report = report
        self._batches: list[dict[str, _Lists]] = []
        if file is not None:
            self._batches = [_lists_of(batch) for batch in file.table.to_batches()]
        self._batch_starts = _starts(self._batches)

    @classmethod
    def empty(cls) -> "Tokens":
        """Return the tokens of no rows."""
        import numpy

        return cls(
            None,
            numpy.empty(0, numpy.int64),
            TokenReport(),
            "",
        )

    @classmethod
    def load(cls, folder: Path) -> "Tokens":
        """Open the tokens that `TokenWriter` wrote."""
        import numpy

        report = TokenReport.from_dict(read_json(folder / REPORT_FILE))
        order = numpy.load(folder / ORDER_FILE)
        return cls(
            ArrowFile(folder / TOKENS_FILE),
            order,
            report,
            folder.name,
        )

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each example."""
        return self._select(lambda batch: batch["input_ids"].lengths)

    @property
    def full_lengths(self) -> list[int]:
        """The number of tokens that each example had before it was cut."""
        return self._select_column("full_length")

    @property
    def row_positions(self) -> list[int]:
        """The position of each example's row among the rows that were tokenised.

        Of a row that stands several times it is the first one.
        """
        return self._select_column("row")

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self._example(int(number)) for number in self._order[index]]
        return self._example(int(self._order[index]))

    def __iter__(self) -> Iterator[Example]:
        return map(self._example, self._order.tolist())

    def to_dataset(self) -> "Dataset":
        """Return the examples as a data set of `datasets`, for TRL."""
        from datasets import Dataset
        from datasets.table import InMemoryTable

        if self._file is None:
            return Dataset.from_dict({"input_ids": [], "labels": []})
        table = self._file.table
        columns = [name for name in EXAMPLE_COLUMNS if name in table.column_names]
        # The fingerprint is given, because datasets would pickle the whole table for one.
        data = InMemoryTable(table.select(columns))
        return Dataset(data, fingerprint=self._key).select(self._order)

    def _example(self, number: int) -> Example:
        assert self._file is not None
        batch = int(self._batch_starts.searchsorted(number, "right")) - 1
        position = number - int(self._batch_starts[batch])
        example = {}
        for name, lists in self._batches[batch].items():
            values = lists[position]
            self._file.count_read(values.nbytes)
            example[name] = values.tolist()
        return example

    def _select(self, column: "Callable[[dict[str, _Lists]], Numbers]") -> list[int]:
        import numpy

        if not self._batches:
            return []
        values = numpy.concatenate([column(batch) for batch in self._batches])
        selected: list[int] = values[self._order].tolist()
        return selected

    def _select_column(self, name: str) -> list[int]:
        if self._file is None:
            return []
        import numpy

        chunks = [integers(chunk) for chunk in self._file.table[name].chunks]
        selected: list[int] = numpy.concatenate(chunks)[self._order].tolist()
        return selected


class TokenWriter:
    """Writes tokens for `Tokens.load`.

    Args:
        folder: An existing folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: pyarrow.ipc.RecordBatchFileWriter | None = None

    def write(self, batch: "pyarrow.RecordBatch") -> None:
        """Add examples. All batches have the same columns."""
        import pyarrow

        if self._writer is None:
            path = str(self._folder / TOKENS_FILE)
            self._writer = pyarrow.ipc.new_file(path, batch.schema)
        self._writer.write_batch(batch)

    def finish(self, order: "Numbers", report: TokenReport) -> None:
        """Complete the files, after at least one batch.

        Args:
            order: The examples in the order of the rows, by their numbers.
            report: What became of the rows.
        """
        import numpy

        assert self._writer is not None
        self._writer.close()
        numpy.save(self._folder / ORDER_FILE, order)
        write_json(self._folder / REPORT_FILE, report.to_dict())


class _Lists:
    """A column of lists of a record batch, as NumPy arrays that share its memory."""

    def __init__(self, column: "pyarrow.ListArray") -> None:
        self._values = integers(column.values)
        self._offsets = integers(column.offsets)

    @property
    def lengths(self) -> "Numbers":
        """The length of each list."""
        lengths: Numbers = self._offsets[1:] - self._offsets[:-1]
        return lengths

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, position: int) -> "Numbers":
        start, end = self._offsets[position : position + 2]
        values: Numbers = self._values[start:end]
        return values


def _lists_of(batch: "pyarrow.RecordBatch") -> dict[str, _Lists]:
    names = [name for name in EXAMPLE_COLUMNS if name in batch.schema.names]
    return {name: _Lists(batch[name]) for name in names}


def _starts(batches: Sequence[dict[str, _Lists]]) -> "Numbers":
    """The number of the first example of each batch."""
    import numpy

    sizes = [len(batch["input_ids"]) for batch in batches]
    return numpy.cumsum([0, *sizes])[: len(sizes)]
