"""Rows of Parquet and Arrow files, and of data sets that `save_to_disk` wrote."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from finetune.data.readers.file import DataFile, UnreadableError, first_line
from finetune.data.types import RawRow

if TYPE_CHECKING:
    import pyarrow

_BATCH_ROWS = 1000


def read_parquet(file: DataFile, _: str | None) -> Iterator[RawRow]:
    """Yield the rows of a Parquet file, read in batches."""
    with file.open() as stream:
        _require_content(stream)
        yield from _rows_of_batches(_parquet_batches(stream), "Parquet file")


def read_arrow(file: DataFile, _: str | None) -> Iterator[RawRow]:
    """Yield the rows of an Arrow IPC file (Feather is one), or of an IPC stream."""
    with file.open() as stream:
        _require_content(stream)
        yield from _rows_of_batches(_ipc_batches(stream), "Arrow file")


def read_saved_dataset(file: DataFile) -> Iterator[RawRow]:
    """Yield the rows of a folder that `datasets.Dataset.save_to_disk` wrote."""
    try:
        state = json.loads((file.path / "state.json").read_text())
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UnreadableError(
            "its state.json can't be read; save the data set again"
        ) from None
    for name in names:
        if not (file.path / name).is_file():
            raise UnreadableError(f"{name} is missing; save the data set again")
        with open(file.path / name, "rb") as stream:
            yield from _rows_of_batches(_ipc_batches(stream), f"Arrow file {name}")


def schema_metadata(file: DataFile) -> dict[bytes, bytes]:
    """Return what a Parquet or Arrow file says about its columns.

    Nothing for files of other types and for broken ones: reading their rows says what is wrong.
    """
    suffix = file.type[0]
    if suffix not in (".parquet", ".arrow", ".feather"):
        return {}
    import pyarrow.parquet

    try:
        with file.open() as stream:
            if suffix == ".parquet":
                schema = pyarrow.parquet.read_schema(stream)
            else:
                schema = _ipc_reader(stream).schema
    except (OSError, ValueError, UnreadableError):
        return {}
    return dict(schema.metadata or {})


def _require_content(stream: BinaryIO) -> None:
    if not stream.read(1):
        raise UnreadableError("the file is empty")
    stream.seek(0)


def _parquet_batches(stream: BinaryIO) -> "Iterator[pyarrow.RecordBatch]":
    import pyarrow.parquet

    yield from pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=_BATCH_ROWS)


def _ipc_batches(stream: BinaryIO) -> "Iterator[pyarrow.RecordBatch]":
    import pyarrow

    reader = _ipc_reader(stream)
    if isinstance(reader, pyarrow.ipc.RecordBatchFileReader):
        yield from (
            reader.get_batch(index) for index in range(reader.num_record_batches)
        )
    else:
        yield from reader


def _ipc_reader(
    stream: BinaryIO,
) -> "pyarrow.ipc.RecordBatchFileReader | pyarrow.ipc.RecordBatchStreamReader":
    import pyarrow

    is_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    return pyarrow.ipc.open_file(stream) if is_file else pyarrow.ipc.open_stream(stream)


def _rows_of_batches(
    batches: "Iterator[pyarrow.RecordBatch]", kind: str
) -> Iterator[RawRow]:
    """Yield the rows of batches, a few at a time as Python values."""
    import pyarrow

    try:
        for batch in batches:
            names = batch.schema.names
            repeated = next((name for name in names if names.count(name) > 1), None)
            if repeated is not None:
                raise UnreadableError(f"has two columns '{repeated}'")
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                yield from batch.slice(start, _BATCH_ROWS).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UnreadableError(f"no readable {kind} ({first_line(error)})") from None
