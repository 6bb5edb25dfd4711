"""All rows that a config reads, read once and kept in the cache until a file or a key changes."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config.sections.dataset import DatasetSettings
from finetune.data.conversion import RowFormats
from finetune.data.duplicates import Ties, find_ties
from finetune.data.readers.file import DataFile
from finetune.data.readers.identity import file_identity
from finetune.data.reading import OpenedPath, read_path
from finetune.data.report import Report
from finetune.data.row_chunks import progress_bar
from finetune.data.row_file import RowWriter, StoredRows
from finetune.data.types import fingerprint
from finetune.files.atomic import (
    draft_folder,
    read_json,
    write_json,
)
from finetune.files.cache import cache_folder, load_cached

if TYPE_CHECKING:
    import numpy

    Numbers = numpy.ndarray[Any, numpy.dtype[numpy.int64]]

SPLIT_KEYS = (
    "path",
    "limit",
    "eval_fraction",
    "test_fraction",
    "split_seed",
    "max_length",
    "packing",
    "loss_on",
    "on_too_long",
)
"""Keys that do not change which rows are read. The paths count by their opened sources."""

SUMMARY_FILE = "summary.json"
TIES_FILE = "ties.npz"


@dataclass(frozen=True)
class AllRows:
    """All rows that a config reads: first those of `dataset.path`, then those of held-out files."""

    folder: Path
    count: int
    """The number of all rows."""
    source_ends: list[int]
    """For each source of `dataset.path` the number that follows its last row."""
    file_splits: dict[str, range]
    """The rows of each split that files give."""
    report: Report
    """What was left out, and the lines that were logged."""

    @property
    def pool(self) -> int:
        """The number of rows of `dataset.path`."""
        return self.source_ends[-1]

    def rows(self, numbers: "Numbers | Sequence[int]") -> StoredRows:
        """Return some of the rows, by their numbers."""
        import numpy

        return StoredRows(self.folder, numpy.asarray(numbers, numpy.int64))

    @functools.cached_property
    def ties(self) -> Ties | None:
        """The ties of the rows; None where they were not looked for."""
        path = self.folder / TIES_FILE
        return Ties.load(path) if path.exists() else None


def read_all_rows(
    opened: Mapping[str, Sequence[OpenedPath]],
    settings: DatasetSettings,
    with_ties: bool,
) -> AllRows:
    """Read the rows of all paths, or take them from the cache.

    Args:
        opened: The paths of `train`, and of each split that files give.
        settings: How rows are read.
        with_ties: Whether rows that belong together are looked for.

    Raises:
        ConfigError: A path, a line or a row can't be read.
    """
    key = _key(opened, settings, with_ties)
    if key is None:
        return _read_without_key(opened, settings, with_ties)
    is_new = False

    def create(draft: Path) -> None:
        nonlocal is_new
        is_new = True
        _read(draft, opened, settings, with_ties)

    all_rows = load_cached("rows", key, create, _load)
    if not is_new:
        all_rows.report.repeat()
    return all_rows


def _key(
    opened: Mapping[str, Sequence[OpenedPath]],
    settings: DatasetSettings,
    with_ties: bool,
) -> str | None:
    """A hash of everything that the rows depend on; None where a source has no identity."""
    sources = {
        split: [path.identity for path in paths] for split, paths in opened.items()
    }
    for paths in opened.values():
        for path in paths:
            if any(source.identity is None for source in path.sources):
                return None
    values = dataclasses.asdict(settings)
    reading = {name: value for name, value in values.items() if name not in SPLIT_KEYS}
    return fingerprint([_code_hash(), sources, reading, with_ties])


@functools.cache
def _code_hash() -> str:
    """A hash of the code that reads rows, so that rows of another version are read again."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read_without_key(
    opened: Mapping[str, Sequence[OpenedPath]],
    settings: DatasetSettings,
    with_ties: bool,
) -> AllRows:
    """Read rows of which nothing tells whether they are those of the last time: always anew."""
    with draft_folder(cache_folder() / "rows", "unidentified") as draft:
        _read(draft, opened, settings, with_ties)
        # All files count: the same rows may be divided otherwise, and have other ties.
        key = file_identity(DataFile(str(draft)))
        assert key is not None

        def create(folder: Path) -> None:
            for file in draft.iterdir():
                file.rename(folder / file.name)

        return load_cached(
            "rows",
            key[:16],
            create,
            _load,
        )


def _read(
    folder: Path,
    opened: Mapping[str, Sequence[OpenedPath]],
    settings: DatasetSettings,
    with_ties: bool,
) -> None:
    """Read the rows of all paths into a folder."""
    report = Report()
    formats = RowFormats(settings)
    source_ends = []
    splits = {}
    with progress_bar("reading rows") as bar, RowWriter(folder, bar.update) as writer:
        for split, paths in opened.items():
            start = len(writer)
            for path in paths:
                read_path(path, formats, report, writer)
                if split == "train":
                    source_ends.append(len(writer))
            splits[split] = [start, len(writer)]
        formats.check_ignored()
        groups = writer.groups
    if with_ties:
        rows = StoredRows.all_of(folder, len(groups))
        find_ties(rows, groups).save(folder / TIES_FILE)
    summary = {
        "count": len(groups),
        "has_ties": with_ties,
        "source_ends": source_ends,
        "splits": splits,
        "report": report.to_dict(),
    }
    write_json(folder / SUMMARY_FILE, summary)


def _load(folder: Path) -> AllRows:
    """Open the rows of a folder that `_read` wrote.

    Raises:
        Exception: A file is missing or damaged.
    """
    summary = read_json(folder / SUMMARY_FILE)
    StoredRows.all_of(folder, summary["count"]).check()
    if summary["has_ties"]:
        Ties.check(folder / TIES_FILE)
    file_splits = {
        split: range(*bounds)
        for split, bounds in summary["splits"].items()
        if split != "train"
    }
    report = Report.from_dict(summary["report"])
    return AllRows(
        folder,
        summary["count"],
        summary["source_ends"],
        file_splits,
        report,
    )
