"""Text files: their encodings, and files that are no text."""

import codecs
import contextlib
import io
import re
from collections.abc import Iterator
from typing import TextIO, cast

from finetune.data.readers.file import DataFile, UnreadableError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # it begins with the mark of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks and the encodings that they name."""

_BINARY_FILES = (
    (b"\x1f\x8b", "a gzip file: its name must end in .gz"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file: its name must end in .zst"),
    (b"PAR1\x15", "a Parquet file: its name must end in .parquet"),
    (b"ARROW1\0\0", "an Arrow file: its name must end in .arrow"),
    (b"PK\x03\x04", "a zip archive or a spreadsheet: unpack it, or save it as .csv"),
    (b"BZh", "a bzip2 file: unpack it"),
    (b"\xfd7zXZ", "an xz file: unpack it"),
    (b"SQLite format 3\0", "an SQLite database: save its rows as .jsonl or .csv"),
)
"""How other files begin that are often given in place of a text file."""

_SAMPLE_BYTES = 65536


@contextlib.contextmanager
def open_text(
    file: DataFile, encoding: str | None, newline: str | None = None
) -> Iterator[TextIO]:
    """Open a text file.

    Args:
        file: A text file, perhaps compressed.
        encoding: `dataset.encoding`; a byte order mark wins over it. None: UTF-8.
        newline: As of `open`.

    Raises:
        UnreadableError: The file is empty, or begins as a binary file does.
    """
    with file.open() as stream:
        # GzipFile.peek and that of other streams differ in how they read, so all are wrapped.
        buffered = io.BufferedReader(cast(io.RawIOBase, stream))
        start = buffered.peek(16)[:16]
        if not start:
            raise UnreadableError("the file is empty")
        for beginning, description in _BINARY_FILES:
            if start.startswith(beginning):
                raise UnreadableError(f"is {description}")
        yield io.TextIOWrapper(
            buffered,
            encoding=_mark_encoding(start) or encoding or "utf-8",
            newline=newline,
        )


def undecodable_reason(
    file: DataFile, encoding: str | None, error: UnicodeError
) -> str:
    """Return why a text file can't be decoded, with the encoding that it probably has.

    Args:
        file: The file.
        encoding: `dataset.encoding`.
        error: What decoding raised.
    """
    with file.open() as stream:
        mark_encoding = _mark_encoding(stream.read(4))
    if mark_encoding not in (None, "utf-8-sig"):
        reason = error.reason if isinstance(error, UnicodeDecodeError) else str(error)
        return f"begins with the mark of {mark_encoding} but is no such text ({reason})"
    tried = "utf-8" if mark_encoding else encoding or "utf-8"
    line, start, sample = _undecodable_sample(file, tried)
    likely = _likely_encoding(sample, start)
    if likely is None:
        return f"line {line} is not {tried.upper()} text; it looks like a binary file"
    hint = f"it looks like {likely}: dataset.encoding={likely} reads it"
    if likely == "utf-8":
        hint = "it is UTF-8: dataset.encoding=null reads it"
    return f"line {line} is not {tried.upper()} text; {hint}"


def _mark_encoding(start: bytes) -> str | None:
    """The encoding that a byte order mark names, if the file has one."""
    return next((name for mark, name in _MARKS if start.startswith(mark)), None)


def _undecodable_sample(file: DataFile, encoding: str) -> tuple[int, int, bytes]:
    """The first line that can't be decoded.

    Returns:
        The line's number, where it begins in the file in bytes, and bytes from there on.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    line = 1
    start = 0
    with file.open() as stream:
        while piece := stream.readline(_SAMPLE_BYTES):
            try:
                decoder.decode(piece)
            except UnicodeError:
                return line, start, piece + stream.read(_SAMPLE_BYTES)
            line += piece.endswith(b"\n")
            start += len(piece)
    return line, start, b""


def _likely_encoding(sample: bytes, start: int) -> str | None:
    """The encoding that a text probably has; None if it looks like no text.

    Args:
        sample: Bytes of the text.
        start: Where they begin in the file.
    """
    zeros = [index for index, byte in enumerate(sample, start) if not byte]
    if len(zeros) > len(sample) / 4:  # every second byte of western text in UTF-16
        odd = sum(index % 2 for index in zeros)
        return "utf-16-le" if odd * 2 > len(zeros) else "utf-16-be"
    if zeros or len(re.findall(rb"[\x01-\x08\x0e-\x1f]", sample)) > len(sample) / 50:
        return None
    if sample and _decodes(sample, "utf-8"):
        return "utf-8"
    # In western languages letters with accents stand alone or in pairs between those of ASCII; in
    # other languages whole words are no ASCII, and a letter may take several bytes.
    runs = re.findall(rb"[\x80-\xff]+", sample)
    if sum(map(len, runs)) < 2 * len(runs) and _decodes(sample, "cp1252"):
        return "cp1252"
    from charset_normalizer import from_bytes

    guess = from_bytes(sample).best()
    return guess.encoding if guess is not None else None


def _decodes(sample: bytes, encoding: str) -> bool:
    try:
        codecs.getincrementaldecoder(encoding)().decode(sample)  # its end may be cut
    except UnicodeError:
        return False
    return True
