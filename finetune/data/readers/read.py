"""Read raw rows from files.

To add a file type: write a function from a file and `dataset.encoding` to its rows, add it to
`READERS`, and add its suffix to `finetune/config/data_folder.py`. `read_lines` is an example. A
reader yields rows one by one, and a `BadRow` in place of one that can't be read.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator

from finetune.config.data_folder import ANY_FILE, is_saved_dataset
from finetune.data.readers.arrow_rows import (
    read_arrow,
    read_parquet,
    read_saved_dataset,
)
from finetune.data.readers.delimited import read_csv, read_lines, read_tsv
from finetune.data.readers.file import DataFile, UnreadableError, first_line
from finetune.data.readers.json_rows import read_json, read_json_lines
from finetune.data.readers.text import undecodable_reason
from finetune.data.types import RawRow
from finetune.errors import refusal

READERS: dict[str, Callable[[DataFile, str | None], Iterator[RawRow]]] = {
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".txt": read_lines,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
}
"""The readers by file suffix."""


def read_file(key: str, name: str, encoding: str | None) -> Iterator[RawRow]:
    """Yield the raw rows of a file, and a `BadRow` in place of each that can't be read.

    Args:
        key: The config key that names the file, for error messages.
        name: The path or URL of a file of a type in `READERS`, or the folder of a saved data set.
        encoding: `dataset.encoding`.

    Raises:
        ConfigError: The file can't be opened, is empty, of another type, or broken.
    """
    file = DataFile(name)
    try:
        yield from _read(file, encoding)
    except UnreadableError as error:
        reason = str(error)
    except UnicodeError as error:
        reason = undecodable_reason(file, encoding, error)
    except json.JSONDecodeError as error:
        reason = f"line {error.lineno} is broken JSON ({error.msg})"
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        reason = f"no readable gzip file ({first_line(error)})"
    except OSError as error:
        reason = f"can't be read ({error.strerror or first_line(error)})"
    except Exception as error:  # each object storage has its exceptions
        if not file.remote:
            raise
        reason = f"can't be read ({type(error).__name__}: {first_line(error)})"
    else:
        return
    raise refusal(key, name, reason)


def _read(file: DataFile, encoding: str | None) -> Iterator[RawRow]:
    if not file.remote and is_saved_dataset(file.path):
        return read_saved_dataset(file)
    reader = READERS.get(file.type[0])
    if reader is None:
        raise UnreadableError(f"must be a {ANY_FILE}")
    return reader(file, encoding)
