"""The rows of a run: read, converted to the common form, split."""

import dataclasses
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from finetune.config.sections.dataset import DatasetSettings
from finetune.data.duplicates import Ties, find_ties
from finetune.data.mixture import weigh_rows
from finetune.data.reading import ReadRows, read_path
from finetune.data.report import Report
from finetune.data.split import held_out_count, take_groups
from finetune.data.split_files import file_names, files_by_split, files_for_split
from finetune.data.types import Row, Rows, fingerprint
from finetune.errors import refusal

HELD_OUT = ("test", "eval")
"""The test rows come first, so that which rows these are depends on no other fraction."""

SplitFiles = dict[str, dict[str, list[Path]]]
"""Of each folder in `dataset.path` the files of each split."""


def load_rows(settings: DatasetSettings) -> Rows:
    """Read the data set and split it.

    Raises:
        ConfigError: The data can't be read, or a split has no rows. The message names the key, and
            the line or row.
    """
    report = Report()
    files: SplitFiles = {}
    pool = ReadRows()
    source_ends = []
    for source in settings.sources:
        path = source.path
        files[path] = files_by_split(settings, path)
        pool.extend(read_path("dataset.path", path, files[path].get("train"), settings, report))
        source_ends.append(len(pool))
    from_files = {}
    for split in HELD_OUT:
        rows = _read_split(split, settings, files, report)
        if rows is not None:
            from_files[split] = rows
    ties = _find_ties(settings, pool, from_files)
    order, parts = _divide(settings, len(pool), ties, set(HELD_OUT) - set(from_files), report)
    held_out = {split: [pool.rows[number] for number in parts[split]] for split in parts}
    held_out |= {split: rows.rows for split, rows in from_files.items()}
    twins = _twins_of_training(ties, order, pool, from_files)
    fingerprints = {fingerprint(pool.rows[number]) for number in order}
    for split in ("eval", "test"):
        unique = _drop_duplicates(held_out[split], twins.get(split, set()), fingerprints)
        count = len(held_out[split])
        if count and not unique:
            raise _all_in_training(split, settings, files, count)
        report.drop(f"{split} rows that also stand in training or twice", count - len(unique))
        held_out[split] = unique
    weighted = weigh_rows(order, source_ends, settings, report)
    train = [pool.rows[number] for number in weighted[: settings.limit]]
    if not train:
        raise refusal("dataset.path", settings.path_text, "no rows are left to train on")
    report.log_dropped()
    if len(train) < len(weighted):
        shares = f"{len(train):,} of {len(weighted):,} rows"
        report.note(f"training on {shares} (dataset.limit)")
    return Rows(
        train,
        held_out["eval"],
        held_out["test"],
        report.dropped,
        report.skipped,
        report.notes,
        report.commits,
    )


def load_all_rows(key: str, settings: DatasetSettings) -> list[Row]:
    """Read every row of `settings.path`; of a folder only its test files, if it has any.

    Args:
        key: What error messages call the path.
        settings: The path, and how its rows are read. Weights and `group_by` don't count.

    Raises:
        ConfigError: The path, a line or a row can't be read.
    """
    report = Report()
    settings = dataclasses.replace(settings, group_by=None)
    rows: list[Row] = []
    for source in settings.sources:
        files = files_for_split("test", key, source.path)
        rows += read_path(key, source.path, files, settings, report).rows
    report.log_dropped()
    return rows


def _read_split(
    split: str, settings: DatasetSettings, files: SplitFiles, report: Report
) -> ReadRows | None:
    """The rows of a split that has a path or files of its own; None if it has neither."""
    path: str | None = getattr(settings, f"{split}_path")
    if path is not None:
        key = f"dataset.{split}_path"
        return read_path(key, path, files_for_split(split, key, path), settings, report)
    rows = ReadRows()
    for folder, folder_files in files.items():
        if folder_files.get(split):
            folder_rows = read_path("dataset.path", folder, folder_files[split], settings, report)
            rows.extend(folder_rows)
    return rows if len(rows) else None


def _find_ties(
    settings: DatasetSettings, pool: ReadRows, from_files: dict[str, ReadRows]
) -> Ties | None:
    """The ties of all rows: first the pool, then the rows of files, in the order of the dict.

    None where no rows are held out.
    """
    fractions = [getattr(settings, f"{split}_fraction") for split in HELD_OUT]
    if not from_files and not any(fractions):
        return None
    rows = ReadRows(list(pool.rows), list(pool.groups))
    for split_rows in from_files.values():
        rows.extend(split_rows)
    return find_ties(rows.rows, rows.groups)


def _divide(
    settings: DatasetSettings, total: int, ties: Ties | None, splits: set[str], report: Report
) -> tuple[list[int], dict[str, list[int]]]:
    """Take the held-out rows of the splits that no file gives from the pool.

    Args:
        settings: The fractions and the seed.
        total: The number of rows in the pool.
        ties: The ties of these rows.
        splits: `eval`, `test`, both or none.
        report: Where tied rows are logged.

    Returns:
        The training rows and those of each split, shuffled, by their numbers.

    Raises:
        ConfigError: A fraction takes no row, or leaves none.
    """
    order = list(range(total))
    random.Random(f"split {settings.split_seed}").shuffle(order)
    parts: dict[str, list[int]] = {split: [] for split in splits}
    if ties is None:
        return order, parts
    groups = ties.groups(total)
    for split in HELD_OUT:
        if split not in splits:
            continue
        count = held_out_count(split, settings, total, len(order))
        if not count:
            continue
        parts[split], order = take_groups(order, groups, count)
        if not parts[split]:
            raise _all_tied(split, settings, count, groups)
    if any(parts.values()):
        _note_ties(settings, ties, groups, report)
    return order, parts


def _note_ties(
    settings: DatasetSettings, ties: Ties, groups: Sequence[int], report: Report
) -> None:
    sizes = [size for size in Counter(groups).values() if size > 1]
    if sizes:
        kind = "near twins"
        if settings.group_by is not None:
            kind += f" or of one {settings.group_by} (dataset.group_by)"
        report.note(f"{sum(sizes)} rows in {len(sizes)} groups of {kind} stay in one part")
    if ties.common_texts:
        reason = "each stand in many rows, and keep no rows together"
        report.note(f"{ties.common_texts} questions or answers {reason}")


def _all_tied(
    split: str, settings: DatasetSettings, count: int, groups: Sequence[int]
) -> Exception:
    """The refusal of a fraction that no group of rows fits in."""
    largest = max(Counter(groups).values())
    reason = f"takes {count} of {len(groups)} rows, but {largest} of them stay in one part"
    causes = "near twins"
    if settings.group_by is not None:
        causes += f", or rows of one {settings.group_by}"
    key = f"dataset.{split}_fraction"
    return refusal(key, getattr(settings, key.partition(".")[2]), f"{reason} as {causes}")


def _twins_of_training(
    ties: Ties | None, order: list[int], pool: ReadRows, from_files: dict[str, ReadRows]
) -> dict[str, set[int]]:
    """The rows of held-out files that are tied to a training row, by split.

    Args:
        ties: The ties of the pool and the rows of files.
        order: The training rows.
        pool: The rows that training rows were taken from.
        from_files: The rows of files.
    """
    if ties is None or not from_files:
        return {}
    is_training = bytearray(len(pool))
    for number in order:
        is_training[number] = 1
    tied: set[int] = set()
    for tie in ties.ties:
        if any(number < len(pool) and is_training[number] for number in tie):
            tied.update(number for number in tie if number >= len(pool))
    twins = {}
    start = len(pool)
    for split, rows in from_files.items():
        twins[split] = {number - start for number in tied if 0 <= number - start < len(rows)}
        start += len(rows)
    return twins


def _drop_duplicates(rows: list[Row], twins: set[int], fingerprints: set[str]) -> list[Row]:
    """The held-out rows that occur nowhere else, so that no training row is evaluated.

    Args:
        rows: The rows of the split.
        twins: The indices of those that are tied to a training row.
        fingerprints: Those of all rows so far; those of this split are added.
    """
    unique = []
    for index, row in enumerate(rows):
        row_fingerprint = fingerprint(row)
        if index not in twins and row_fingerprint not in fingerprints:
            fingerprints.add(row_fingerprint)
            unique.append(row)
    return unique


def _all_in_training(
    split: str, settings: DatasetSettings, files: SplitFiles, count: int
) -> Exception:
    """The refusal of a split all of whose rows are training rows; it names the rows' key."""
    reason = f"all {count} rows also stand in training"
    if getattr(settings, f"{split}_path") is not None:
        return refusal(f"dataset.{split}_path", getattr(settings, f"{split}_path"), reason)
    split_files = [file for by_split in files.values() for file in by_split.get(split, ())]
    if split_files:
        reason = f"all {count} rows of {file_names(split_files)} also stand in training"
        return refusal("dataset.path", settings.path_text, reason)
    key = f"{split}_fraction"
    return refusal(f"dataset.{key}", getattr(settings, key), reason)
