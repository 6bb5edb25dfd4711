"""The rows of a run: read, converted to the common form, split."""

import dataclasses
from pathlib import Path

from finetune.config.plain_values import PYTHON_DOCS_LIMIT
from finetune.config.sections.dataset import DatasetSettings
from finetune.data.conversion import RowFormats
from finetune.data.duplicates import Ties, find_ties
from finetune.data.mixture import weigh_rows
from finetune.data.reading import ReadRows, read_path
from finetune.data.report import Report
from finetune.data.split import HELD_OUT, divide_rows
from finetune.data.split_files import file_names, files_by_split, files_for_split
from finetune.data.types import Row, Rows, fingerprint
from finetune.errors import refusal

SplitFiles = dict[str, dict[str, list[Path]]]
"""Of each folder in `dataset.path` the files of each split."""


def load_rows(settings: DatasetSettings) -> Rows:
    """Read the data set and split it.

    Raises:
        ConfigError: The data can't be read, or a split has no rows. The message names the key, and
            the line or row.
    """
    report = Report()
    formats = RowFormats(settings)
    files: SplitFiles = {}
    pool = ReadRows()
    source_ends = []
    for source in settings.sources:
        path = source.path
        files[path] = files_by_split(settings, path)
        pool.extend(
            read_path("dataset.path", path, files[path].get("train"), formats, report)
        )
        source_ends.append(len(pool))
    from_files = {}
    for split in HELD_OUT:
        rows = _read_split(split, formats, files, report)
        if rows is not None:
            from_files[split] = rows
    formats.check_ignored()
    ties = _find_ties(settings, pool, from_files)
    order, parts = divide_rows(
        settings, len(pool), ties, set(HELD_OUT) - set(from_files), report
    )
    held_out = {
        split: [pool.rows[number] for number in parts[split]] for split in parts
    }
    held_out |= {split: rows.rows for split, rows in from_files.items()}
    twins = _twins_of_training(ties, order, pool, from_files)
    fingerprints = {fingerprint(pool.rows[number]) for number in order}
    for split in ("eval", "test"):
        unique = _drop_duplicates(
            held_out[split], twins.get(split, set()), fingerprints
        )
        count = len(held_out[split])
        if count and not unique:
            raise _all_in_training(split, settings, files, count)
        report.drop(
            f"{split} rows that also stand in training or twice", count - len(unique)
        )
        held_out[split] = unique
    weighted = weigh_rows(order, source_ends, settings, report)
    train = [pool.rows[number] for number in weighted[: settings.limit]]
    if not train:
        raise refusal(
            "dataset.path", settings.path_text, "no rows are left to train on"
        )
    report.log_dropped()
    if len(train) < len(weighted):
        shares = f"{len(train):,} of {len(weighted):,} rows"
        report.note(f"training on {shares} ({_limit_reason(settings)})")
    return Rows(
        train,
        held_out["eval"],
        held_out["test"],
        report.dropped,
        report.skipped,
        report.notes,
        report.commits,
        report.formats,
    )


def _limit_reason(settings: DatasetSettings) -> str:
    if (settings.path, settings.limit) == ("python_docs", PYTHON_DOCS_LIMIT):
        # Most likely the user has set no limit: dataset.limit=auto has become this one.
        return f"dataset.limit={settings.limit}, the default of python_docs; null: all rows"
    return "dataset.limit"


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
    formats = RowFormats(settings)
    rows: list[Row] = []
    for source in settings.sources:
        files = files_for_split("test", key, source.path)
        rows += read_path(key, source.path, files, formats, report).rows
    formats.check_ignored()
    report.log_dropped()
    return rows


def _read_split(
    split: str,
    formats: RowFormats,
    files: SplitFiles,
    report: Report,
) -> ReadRows | None:
    """The rows of a split that has a path or files of its own; None if it has neither."""
    path: str | None = getattr(formats.settings, f"{split}_path")
    if path is not None:
        key = f"dataset.{split}_path"
        return read_path(key, path, files_for_split(split, key, path), formats, report)
    rows = ReadRows()
    for folder, folder_files in files.items():
        if folder_files.get(split):
            folder_rows = read_path(
                "dataset.path", folder, folder_files[split], formats, report
            )
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


def _twins_of_training(
    ties: Ties | None,
    order: list[int],
    pool: ReadRows,
    from_files: dict[str, ReadRows],
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
    tied = ties.tied_to(order, len(pool))
    twins = {}
    start = len(pool)
    for split, rows in from_files.items():
        twins[split] = {
            number - start for number in tied if 0 <= number - start < len(rows)
        }
        start += len(rows)
    return twins


def _drop_duplicates(
    rows: list[Row], twins: set[int], fingerprints: set[str]
) -> list[Row]:
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
    split: str,
    settings: DatasetSettings,
    files: SplitFiles,
    count: int,
) -> Exception:
    """The refusal of a split all of whose rows are training rows; it names the rows' key."""
    reason = f"all {count} rows also stand in training"
    if getattr(settings, f"{split}_path") is not None:
        return refusal(
            f"dataset.{split}_path", getattr(settings, f"{split}_path"), reason
        )
    split_files = [
        file for by_split in files.values() for file in by_split.get(split, ())
    ]
    if split_files:
        reason = f"all {count} rows of {file_names(split_files)} also stand in training"
        return refusal("dataset.path", settings.path_text, reason)
    key = f"{split}_fraction"
    return refusal(f"dataset.{key}", getattr(settings, key), reason)
