"""The rows of a run: read, converted to the common form, split."""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finetune.config.plain_values import PYTHON_DOCS_LIMIT
from finetune.config.sections.dataset import DatasetSettings
from finetune.data.all_rows import AllRows, read_all_rows
from finetune.data.mixture import weigh_rows
from finetune.data.prompts import system_of
from finetune.data.reading import OpenedPath, open_path
from finetune.data.report import Report
from finetune.data.row_chunks import progress_bar
from finetune.data.row_file import KeyDigest, StoredRows
from finetune.data.split import HELD_OUT, divide_rows
from finetune.data.split_files import file_names, files_by_split, files_for_split
from finetune.data.types import ListDigest, SkippedRow, canonical_text, fingerprint
from finetune.errors import refusal
from finetune.files.atomic import read_json, write_json
from finetune.files.cache import load_cached

SplitFiles = dict[str, dict[str, list[Path]]]
"""Of each folder in `dataset.path` the files of each split."""

SPLITS = ("train", "eval", "test")

SUMMARY_FILE = "split.json"


@dataclass(frozen=True)
class Rows:
    """The rows of a run in the common form, by split."""

    train: StoredRows
    evaluation: StoredRows
    test: StoredRows
    fingerprint: str
    """A hash of every row of every split."""
    shared_system: str | None
    """The system turn with which all training rows begin; None if they differ."""
    dropped: dict[str, int]
    """How many rows were left out, by reason."""
    skipped: list[SkippedRow] = field(default_factory=list)
    """The first rows that `dataset.on_bad_row=skip` left out; `dropped` counts all."""
    notes: list[str] = field(default_factory=list)
    """What the log says about the split: tied rows, weights, limits."""
    commits: dict[str, str] = field(default_factory=dict)
    """The commits of the data sets on the hub, by `dataset.path`."""
    formats: list[str] = field(default_factory=list)
    """What the log says about formats: which column is what, and which are not used."""

    @property
    def by_split(self) -> dict[str, StoredRows]:
        """The rows by the names of their splits."""
        return {"train": self.train, "eval": self.evaluation, "test": self.test}

    @property
    def counts(self) -> dict[str, object]:
        """The number of rows of each split, and of those left out by reason, for `result.json`.

        Skipped rows, notes and commits are listed where there are any.
        """
        sizes = {split: len(rows) for split, rows in self.by_split.items()}
        lists = {
            "skipped": [dataclasses.asdict(row) for row in self.skipped],
            "notes": self.notes,
            "commits": self.commits,
        }
        filled_lists = {name: items for name, items in lists.items() if items}
        return {**sizes, "dropped": self.dropped, **filled_lists}


def load_rows(settings: DatasetSettings) -> Rows:
    """Read the data set and split it, or take both from the cache.

    Raises:
        ConfigError: The data can't be read, or a split has no rows. The message names the key, and
            the line or row.
    """
    files = {
        source.path: files_by_split(settings, source.path)
        for source in settings.sources
    }
    opened = {"train": _open_training(settings, files)}
    for split in HELD_OUT:
        paths = _open_split(split, settings, files)
        if paths:
            opened[split] = paths
    fractions = [settings.held_out_fraction(split) for split in HELD_OUT]
    with_ties = len(opened) > 1 or any(fractions)
    all_rows = read_all_rows(opened, settings, with_ties)
    is_new = False

    def create(draft: Path) -> None:
        nonlocal is_new
        is_new = True
        _save_split(draft, settings, files, all_rows)

    def load(folder: Path) -> tuple[Rows, Report]:
        return _load_split(folder, all_rows)

    key = _split_key(settings, all_rows)
    rows, report = load_cached("splits", key, create, load)
    if not is_new:
        report.repeat(start=len(all_rows.report.lines))
    return rows


def _open_training(settings: DatasetSettings, files: SplitFiles) -> list[OpenedPath]:
    opened = []
    for path, split_files in files.items():
        training_files = split_files.get("train")
        opened.append(open_path("dataset.path", path, training_files, settings))
    return opened


def _open_split(
    split: str, settings: DatasetSettings, files: SplitFiles
) -> list[OpenedPath]:
    """Open the path or the files of a split that has any of its own."""
    path: str | None = getattr(settings, f"{split}_path")
    if path is not None:
        key = f"dataset.{split}_path"
        return [
            open_path(
                key,
                path,
                files_for_split(split, key, path),
                settings,
            )
        ]
    opened = []
    for folder, split_files in files.items():
        if split_files.get(split):
            opened.append(
                open_path(
                    "dataset.path",
                    folder,
                    split_files[split],
                    settings,
                )
            )
    return opened


def _split_key(settings: DatasetSettings, all_rows: AllRows) -> str:
    """A hash of everything that the split depends on."""
    weights = [source.weight for source in settings.sources]
    fractions = [settings.eval_fraction, settings.test_fraction]
    values = [weights, fractions, settings.split_seed, settings.limit]
    return fingerprint([all_rows.folder.name, values])


def _save_split(
    folder: Path, settings: DatasetSettings, files: SplitFiles, all_rows: AllRows
) -> None:
    """Divide all rows, and write which rows each split has."""
    report = copy.deepcopy(all_rows.report)
    numbers = _divide(settings, files, all_rows, report)
    digests = {split: KeyDigest() for split in SPLITS}
    systems: set[str | None] = set()
    whole_digest = ListDigest()
    total = sum(map(len, numbers.values()))
    with progress_bar("hashing rows", total) as bar:
        for split in SPLITS:
            whole_digest.begin_list()
            for row in all_rows.rows(numbers[split]):
                text = canonical_text(row)
                whole_digest.update(text)
                digests[split].update(row, text)
                if split == "train" and len(systems) < 2:
                    systems.add(system_of(row))
                bar.update()
            _save_numbers(folder / f"{split}.npy", numbers[split])
    summary = {
        "fingerprint": whole_digest.fingerprint,
        "keys": {split: digest.key for split, digest in digests.items()},
        "shared_system": systems.pop() if len(systems) == 1 else None,
        "report": report.to_dict(),
    }
    write_json(folder / SUMMARY_FILE, summary)


def _load_split(folder: Path, all_rows: AllRows) -> tuple[Rows, Report]:
    import numpy

    summary = read_json(folder / SUMMARY_FILE)
    report = Report.from_dict(summary["report"])
    train, evaluation, test = (
        StoredRows(
            all_rows.folder, numpy.load(folder / f"{split}.npy"), summary["keys"][split]
        )
        for split in SPLITS
    )
    rows = Rows(
        train,
        evaluation,
        test,
        summary["fingerprint"],
        summary["shared_system"],
        report.dropped,
        report.skipped,
        report.notes,
        report.commits,
        report.formats,
    )
    return rows, report


def _save_numbers(path: Path, numbers: Sequence[int]) -> None:
    import numpy

    numpy.save(path, numpy.asarray(numbers, numpy.int64))


def _divide(
    settings: DatasetSettings, files: SplitFiles, all_rows: AllRows, report: Report
) -> dict[str, Sequence[int]]:
    """Return the numbers of the rows of each split, the training rows weighted and limited.

    Raises:
        ConfigError: A split that is asked for has no rows.
    """
    ties = all_rows.ties
    pool = all_rows.pool
    splits = set(HELD_OUT) - set(all_rows.file_splits)
    order, parts = divide_rows(settings, pool, ties, splits, report)
    held_out: dict[str, Sequence[int]] = {**parts, **all_rows.file_splits}
    twins = ties.tied_to(order, pool) if ties is not None else set()
    fingerprints: set[str] = set()
    for split in ("eval", "test"):
        rows = all_rows.rows([n for n in held_out[split] if n not in twins])
        unique = _drop_duplicates(rows, fingerprints)
        count = len(held_out[split])
        if count and not unique:
            raise _all_left_out(
                split,
                settings,
                files,
                count,
                in_evaluation=bool(rows),
            )
        reason = f"{split} rows that also stand in training or twice"
        report.drop(reason, count - len(unique))
        held_out[split] = unique
    weighted = weigh_rows(order, all_rows.source_ends, settings, report)
    train = weighted[: settings.limit]
    if not train:
        reason = "no rows are left to train on"
        raise refusal("dataset.path", settings.path_text, reason)
    report.log_dropped()
    if len(train) < len(weighted):
        shares = f"{len(train):,} of {len(weighted):,} rows"
        report.note(f"training on {shares} ({_limit_reason(settings)})")
    return {"train": train, **held_out}


def _limit_reason(settings: DatasetSettings) -> str:
    if (settings.path, settings.limit) == ("python_docs", PYTHON_DOCS_LIMIT):
        # Most likely the user has set no limit: dataset.limit=auto has become this one.
        return f"dataset.limit={settings.limit}, the default of python_docs; null: all rows"
    return "dataset.limit"


def load_all_rows(key: str, settings: DatasetSettings) -> StoredRows:
    """Read every row of `settings.path`; of a folder only its test files, if it has any.

    Args:
        key: What error messages call the path.
        settings: The path, and how its rows are read. Weights and `group_by` don't count.

    Raises:
        ConfigError: The path, a line or a row can't be read.
    """
    settings = dataclasses.replace(settings, group_by=None)
    opened = []
    for source in settings.sources:
        files = files_for_split("test", key, source.path)
        opened.append(open_path(key, source.path, files, settings))
    all_rows = read_all_rows({"train": opened}, settings, with_ties=False)
    return all_rows.rows(range(all_rows.count))


def _drop_duplicates(rows: StoredRows, fingerprints: set[str]) -> list[int]:
    """Return the numbers of the rows that stand in no held-out split yet.

    Args:
        rows: The rows of a split.
        fingerprints: Those of all held-out rows so far; those of this split are added.
    """
    unique = []
    for number, row in zip(rows.numbers.tolist(), rows, strict=True):
        row_fingerprint = fingerprint(row)
        if row_fingerprint not in fingerprints:
            fingerprints.add(row_fingerprint)
            unique.append(number)
    return unique


def _all_left_out(
    split: str,
    settings: DatasetSettings,
    files: SplitFiles,
    count: int,
    in_evaluation: bool,
) -> Exception:
    """The refusal of a split all of whose rows stand in training; it names the rows' key.

    Args:
        split: `eval` or `test`.
        settings: The paths and fractions.
        files: Of each folder in `dataset.path` the files of each split.
        count: The number of the split's rows.
        in_evaluation: Some stand not in training, but among the evaluation rows.
    """
    reason = "also stand in training"
    if in_evaluation:
        reason += " or among the evaluation rows"
        if settings.eval_path is not None:
            reason += f" (dataset.eval_path={settings.eval_path})"
    rows = f"all {count} rows"
    key = f"{split}_path"
    value = getattr(settings, key)
    if value is None:
        split_files = [
            file for by_split in files.values() for file in by_split.get(split, ())
        ]
        if split_files:
            rows += f" of {file_names(split_files)}"
            key, value = "path", settings.path_text
        else:
            key = f"{split}_fraction"
            value = getattr(settings, key)
    return refusal(f"dataset.{key}", value, f"{rows} {reason}")
