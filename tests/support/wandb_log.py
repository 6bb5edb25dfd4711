"""Read the file of an offline W&B run."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def _wandb_file(file: Path) -> Iterator[Any]:
    """The records of a W&B file: a 7-byte header, then 32 KiB blocks of LevelDB's log."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (
            32768 - position % 32768 < 7
        ):  # no chunk's header fits in what is left of the block
            position += 32768 - position % 32768
            continue
        length, kind = (
            int.from_bytes(data[position + 4 : position + 6], "little"),
            data[position + 6],
        )
        if position + 7 + length > len(data):
            return  # W&B is still writing it
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last chunk of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def wandb_files(folder: Path) -> list[list[Any]]:
    """The records of each offline W&B run below a run's folder, the oldest first.

    W&B writes the last of them from a process of its own, a moment after the run has finished.
    """
    files = sorted(
        folder.glob("wandb/offline-run-*/run-*.wandb"),
        key=lambda path: path.stat().st_ctime_ns,
    )
    end = time.monotonic() + 120
    while True:
        found = [list(_wandb_file(file)) for file in files]
        if (
            all(any(record.HasField("exit") for record in records) for records in found)
            or time.monotonic() > end
        ):
            return found
        time.sleep(0.05)


def wandb_items(items: Any) -> dict[str, Any]:
    """Return the items of a record by name."""
    return {
        "/".join(item.nested_key) or item.key: json.loads(item.value_json)
        for item in items
    }


def wandb_summary(records: list[Any]) -> dict[str, Any]:
    """Return the final summary of a run."""
    summary: dict[str, Any] = {}
    for record in records:
        if record.HasField("summary"):
            summary |= wandb_items(record.summary.update)
    return summary


def wandb_history(records: list[Any]) -> list[dict[str, Any]]:
    """Return the logged rows of metrics."""
    return [
        wandb_items(record.history.item)
        for record in records
        if record.HasField("history")
    ]
