"""Read and write W&B's `.wandb` files, in which it keeps everything that a run has logged.

A file has a header, then the blocks of a LevelDB log, whose records are protocol buffers. A record
that does not fit into the rest of its block is cut into fragments.
"""

import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.compat import wandb_record_class
from finetune.files.atomic import name_file_in_errors

if TYPE_CHECKING:
    from wandb.proto.wandb_internal_pb2 import Record

_HEADER = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
"""The file's header: identity, magic number, version."""

_BLOCK_BYTES = 32768

_FRAGMENT = struct.Struct("<IHB")
"""The header of a fragment: checksum, length, kind."""

_KINDS = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}
"""The kind of a fragment, by whether it is the first one of its record, and the last one."""


def read_records(path: Path) -> "list[Record]":
    """Return the complete records of a file in their order.

    A process that was killed leaves a file whose end is missing, perhaps within a record.

    Raises:
        OSError: The file can't be read.
    """
    record_class = wandb_record_class()
    data = path.read_bytes()
    records = []
    position = len(_HEADER)
    content = b""
    while position + _FRAGMENT.size <= len(data):
        rest = _BLOCK_BYTES - position % _BLOCK_BYTES
        if rest < _FRAGMENT.size:
            position += rest
            continue
        checksum, length, kind = _FRAGMENT.unpack_from(data, position)
        position += _FRAGMENT.size
        fragment = data[position : position + length]
        position += length
        if checksum != _checksum(fragment, kind):
            break
        content += fragment
        if kind in (_KINDS[True, True], _KINDS[False, True]):
            records.append(record_class.FromString(content))
            content = b""
    return records


def write_records(path: Path, records: "Iterable[Record]") -> None:
    """Write a file, replacing the one at `path` when it is complete.

    For one writer at a time: the draft has a fixed name.

    Raises:
        OSError: The file can't be written (disk full); the message names `path`.
    """
    data = bytearray(_HEADER)
    for number, record in enumerate(records, 1):
        record.num = number
        _append(data, record.SerializeToString())
    # Not `.wandb`, by which W&B finds its files.
    draft = path.with_name(f".{path.name}.draft")
    try:
        with name_file_in_errors(path):
            draft.write_bytes(data)
            os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _append(data: bytearray, content: bytes) -> None:
    """Append one record, in as many fragments as it needs."""
    is_first = True
    while True:
        rest = _BLOCK_BYTES - len(data) % _BLOCK_BYTES
        if rest < _FRAGMENT.size:
            data += bytes(rest)
            rest = _BLOCK_BYTES
        fragment = content[: rest - _FRAGMENT.size]
        content = content[len(fragment) :]
        kind = _KINDS[is_first, not content]
        data += _FRAGMENT.pack(_checksum(fragment, kind), len(fragment), kind)
        data += fragment
        if not content:
            return
        is_first = False


def _checksum(fragment: bytes, kind: int) -> int:
    return zlib.crc32(fragment, zlib.crc32(bytes([kind])))
