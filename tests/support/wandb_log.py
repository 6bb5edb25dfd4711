"""Read the files of offline W&B runs."""

import json
import time
from pathlib import Path
from typing import Any

from finetune.tracking.wandb_file import read_records


def wandb_files(folder: Path, run_id: str = "*") -> list[list[Any]]:
    """The records of each offline W&B run whose files are in a folder, the oldest first.

    W&B writes the last of them from a process of its own, a moment after the run has finished.

    Args:
        folder: A study's folder, or that of a run that belongs to none.
        run_id: The id of the W&B runs.
    """
    pattern = f"wandb/offline-run-*/run-{run_id}.wandb"
    end = time.monotonic() + 120
    while True:
        files = sorted(folder.glob(pattern), key=lambda file: file.parent.name)
        found = [read_records(file) for file in files]
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
