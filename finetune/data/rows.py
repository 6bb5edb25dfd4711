"""The rows of a run: read, converted to the common form, split."""

import logging
import random
from pathlib import Path

from finetune.config.schema import PYTHON_DOCS_LIMIT
from finetune.config.sections.dataset import DatasetSettings
from finetune.data.formats import FORMATS, detect_format
from finetune.data.sources import open_files, open_source
from finetune.data.split_files import file_names, files_by_split, files_for_split
from finetune.data.types import Row, Rows, fingerprint
from finetune.errors import refusal

log = logging.getLogger(__name__)

Dropped = dict[str, int]
"""How many rows were left out, by reason."""


def load_rows(settings: DatasetSettings) -> Rows:
    """Read the data set and split it.

    Raises:
        ConfigError: The data can't be read, or a split has no rows. The message names the key, and
            the line or row.
    """
    dropped: Dropped = {}
    files = files_by_split(settings)
    pool = _read("dataset.path", settings.path, files.get("train"), settings, dropped)
    random.Random(f"split {settings.split_seed}").shuffle(pool)
    total = len(pool)
    held_out: dict[str, list[Row]] = {}
    # The test rows come first, so that which rows these are depends on no other fraction.
    for split in ("test", "eval"):
        rows = _read_split(split, settings, files.get(split), dropped)
        if rows is None:
            count = _held_out_count(split, settings, total, len(pool))
            rows, pool = pool[:count], pool[count:]
        held_out[split] = rows
    fingerprints = {fingerprint(row) for row in pool}
    for split in ("eval", "test"):
        unique = _drop_duplicates(split, held_out[split], fingerprints, dropped)
        if held_out[split] and not unique:
            raise _all_in_training(split, settings, files.get(split), len(held_out[split]))
        held_out[split] = unique
    train = pool[: settings.limit]
    if not train:
        raise refusal("dataset.path", settings.path, "no rows are left to train on")
    _log_dropped(dropped)
    if len(train) < len(pool):
        _log_limit(settings, len(train), len(pool))
    return Rows(train, held_out["eval"], held_out["test"], dropped)


def load_all_rows(key: str, settings: DatasetSettings) -> list[Row]:
    """Read every row of `settings.path`; of a folder only its test files, if it has any.

    Args:
        key: What error messages call the path.
        settings: The path, and how its rows are read.

    Raises:
        ConfigError: The path, a line or a row can't be read.
    """
    dropped: Dropped = {}
    files = files_for_split("test", key, settings.path)
    rows = _read(key, settings.path, files, settings, dropped)
    _log_dropped(dropped)
    return rows


def _log_limit(settings: DatasetSettings, trained: int, total: int) -> None:
    reason = "dataset.limit"
    if (settings.path, settings.limit) == ("python_docs", PYTHON_DOCS_LIMIT):
        # Most likely the user has set no limit: dataset.limit=auto has become this one.
        reason = f"dataset.limit={settings.limit}, the default of python_docs; null: all rows"
    log.info("data: training on %s of %s rows (%s)", f"{trained:,}", f"{total:,}", reason)


def _log_dropped(dropped: Dropped) -> None:
    for reason, count in dropped.items():
        log.info("data: left out %d %s", count, reason)


def _read_split(
    split: str, settings: DatasetSettings, files: list[Path] | None, dropped: Dropped
) -> list[Row] | None:
    """The rows of a split that has a path or files of its own; None if it has neither."""
    path: str | None = getattr(settings, f"{split}_path")
    if path is not None:
        key = f"dataset.{split}_path"
        return _read(key, path, files_for_split(split, key, path), settings, dropped)
    if files:
        return _read("dataset.path", settings.path, files, settings, dropped)
    return None


def _held_out_count(split: str, settings: DatasetSettings, total: int, remaining: int) -> int:
    """How many rows a split's fraction takes.

    Args:
        split: `eval` or `test`.
        settings: They hold the fraction, of all rows.
        total: The number of all rows.
        remaining: The number of rows that no other split has taken.

    Raises:
        ConfigError: The fraction takes no row, or leaves none.
    """
    fraction: float = getattr(settings, f"{split}_fraction")
    count = round(fraction * total)
    if fraction > 0 and not 0 < count < remaining:
        reason = f"takes {count} of {total} rows; 0 means none wanted"
        raise refusal(f"dataset.{split}_fraction", fraction, reason)
    return count


def _drop_duplicates(
    split: str, rows: list[Row], fingerprints: set[str], dropped: Dropped
) -> list[Row]:
    """The held-out rows that occur nowhere else, so that no training row is evaluated.

    Args:
        split: `eval` or `test`.
        rows: The rows of the split.
        fingerprints: Those of all rows so far; those of this split are added.
        dropped: Where the duplicates are counted.
    """
    unique = []
    for row in rows:
        row_fingerprint = fingerprint(row)
        if row_fingerprint not in fingerprints:
            fingerprints.add(row_fingerprint)
            unique.append(row)
    if len(unique) < len(rows):
        reason = f"{split} rows that also stand in training or twice"
        dropped[reason] = len(rows) - len(unique)
    return unique


def _all_in_training(
    split: str, settings: DatasetSettings, files: list[Path] | None, count: int
) -> Exception:
    """The refusal of a split all of whose rows are training rows; it names the rows' key."""
    if getattr(settings, f"{split}_path") is not None:
        key = f"{split}_path"
    elif files:
        reason = f"all {count} rows of {file_names(files)} also stand in training"
        return refusal("dataset.path", settings.path, reason)
    else:
        key = f"{split}_fraction"
    reason = f"all {count} rows also stand in training"
    return refusal(f"dataset.{key}", getattr(settings, key), reason)


def _read(
    key: str, path: str, files: list[Path] | None, settings: DatasetSettings, dropped: Dropped
) -> list[Row]:
    """Read all rows of a path in the common form.

    Args:
        key: The config key of the path, for error messages.
        path: A folder, or anything else that `dataset.path` may be.
        files: The files to read if the path is a folder, else None.
        settings: The rows' format. `auto` takes the format of the first row for all rows.
        dropped: Where rows with nothing to learn from are counted.
    """
    sources = (
        [open_source(key, path, settings)]
        if files is None
        else open_files(key, path, files, settings)
    )
    format_name: str = settings.format
    rows: list[Row] = []
    total = 0
    for source in sources:
        for number, raw_row in enumerate(source.rows, start=1):
            if format_name == "auto":
                format_name = detect_format(key, source.name, raw_row, settings.text_field)
            where = f"{key}={source.name}: row {number}"
            content = FORMATS[format_name](raw_row, where, settings.text_field)
            if content is not None:
                rows.append(Row(content, source.name, number, format_name))
            total += 1
    shown_path = path if files is None else f"{path} ({file_names(files)})"
    if not total:
        raise refusal(key, shown_path, "holds no rows")
    if len(rows) < total:
        reason = f"rows of {shown_path} with nothing to learn from"
        dropped[reason] = dropped.get(reason, 0) + total - len(rows)
    if not rows:
        reason = f"no rows are left: none of {total} has any text to learn from"
        raise refusal(key, shown_path, reason)
    return rows
