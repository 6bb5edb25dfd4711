"""The data files of a path: their types by suffix, and the split that a file's name tells.

It belongs to the config, and not to `finetune.data`, because the checks of a config need it:
whether a run has rows to evaluate on depends on the names of the files.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from finetune.errors import refusal

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt")

ARROW_SUFFIXES = (".parquet", ".arrow", ".feather")

SUFFIXES = TEXT_SUFFIXES + ARROW_SUFFIXES

COMPRESSIONS = (".gz", ".zst")
"""Suffixes after those of `TEXT_SUFFIXES`."""

ANY_FILE = f"{' '.join(TEXT_SUFFIXES)} (also .gz .zst) {' '.join(ARROW_SUFFIXES)} file"
"""The types of files that are read, for messages."""

SPLITS = ("train", "eval", "test")

_SPLIT_OF_WORD = {
    "train": "train", "training": "train",
    "validation": "eval", "valid": "eval", "val": "eval", "dev": "eval",
    "eval": "eval", "evaluation": "eval",
    "test": "test", "testing": "test",
}  # fmt: skip

_WORD_BOUNDARY = re.compile(r"[\W\d_]+|(?<=[a-z])(?=[A-Z])")
"""Anything but letters, and the place between a small letter and a capital."""


def file_type(name: str) -> tuple[str, str]:
    """Return the type and the compression of a file by its name.

    `(".jsonl", ".gz")` for `Rows.JSONL.gz`, `(".csv", "")` for `rows.csv`, and two empty texts for
    a file that is not read.
    """
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    compression = ""
    if suffixes and suffixes[-1] in COMPRESSIONS:
        compression = suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    allowed_suffixes = TEXT_SUFFIXES if compression else SUFFIXES
    if suffix not in allowed_suffixes:
        return "", ""
    return suffix, compression


def is_remote(path: str) -> bool:
    """Return whether a path is a URL of object storage, which fsspec opens."""
    return "://" in path and not path.startswith("file://")


def local_path(path: str) -> Path:
    """Return a path on this machine, which may be written as `file://…`."""
    return Path(path.removeprefix("file://")).expanduser()


def is_saved_dataset(folder: Path) -> bool:
    """Return whether `datasets.Dataset.save_to_disk` wrote a folder. It is read like a file."""
    names = ("state.json", "dataset_info.json")
    return all(os.path.isfile(folder / name) for name in names)


def data_folder(path: str) -> Path | None:
    """Return the folder of files that `dataset.path` names.

    None for a file, a saved data set, a URL, a hub id and `python_docs`.
    """
    if path == "python_docs" or is_remote(path):
        return None
    folder = local_path(path)
    if not os.path.isdir(folder) or is_saved_dataset(folder):
        return None
    return folder


def data_files(folder: Path, excluded: Iterable[str | None] = ()) -> list[Path]:
    """Return the files of a folder that can hold rows, ordered by name.

    Saved data sets in the folder, as of a `DatasetDict`, count as files where it has no other.
    Texts (.txt) are read only where nothing else is there, as folders have notes in such files.

    Args:
        folder: The folder; its subfolders are not searched.
        excluded: Paths of files to leave out, or None.

    Raises:
        ConfigError: The folder can't be listed, or its `dataset_dict.json` can't be read.
    """
    excluded_files = set()
    for path in excluded:
        if path is not None:
            excluded_files.add(local_path(path).resolve())
    files = _candidates(folder)
    return [file for file in files if file.resolve() not in excluded_files]


def _candidates(folder: Path) -> list[Path]:
    """The files or saved data sets of a folder that can hold rows."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        reason = f"the folder can't be listed ({error.strerror})"
        raise refusal("dataset.path", folder, reason) from None
    if (folder / "dataset_dict.json").is_file():
        return _saved_splits(folder)
    files = []
    data = []
    for entry in entries:
        suffix, _ = file_type(entry.name)
        if not suffix or entry.is_dir():
            continue
        files.append(entry)
        if suffix != ".txt":
            data.append(entry)
    if data:
        return _without_copies(data)
    saved = [entry for entry in entries if is_saved_dataset(entry)]
    return saved or _without_copies(files)


def _saved_splits(folder: Path) -> list[Path]:
    """The saved data sets of a `DatasetDict`."""
    try:
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        return sorted(folder / name for name in splits)
    except (OSError, ValueError, KeyError, TypeError):
        reason = "its dataset_dict.json can't be read; save the data set again"
        raise refusal("dataset.path", folder, reason) from None


def _without_copies(files: list[Path]) -> list[Path]:
    """The files without compressed copies of files that stand beside them."""
    names = {file.name.lower() for file in files}
    originals = []
    for file in files:
        _, compression = file_type(file.name)
        uncompressed_name = file.name.lower().removesuffix(compression)
        if not compression or uncompressed_name not in names:
            originals.append(file)
    return originals


def named_splits(file: Path) -> list[str]:
    """Return the splits for which a file's name has a word of its own.

    None for `latest.jsonl`, test for `data.test.csv.gz`, train and test for `train_test.json`.
    """
    suffix, compression = file_type(file.name)
    # By their lengths: the name may have its suffixes in capitals.
    stem_length = len(file.name) - len(suffix) - len(compression)
    stem = file.name[:stem_length]
    words = {word.lower() for word in _WORD_BOUNDARY.split(stem)}
    splits = {_SPLIT_OF_WORD[word] for word in words if word in _SPLIT_OF_WORD}
    return [split for split in SPLITS if split in splits]


def has_evaluation_files(path: str, test_path: str | None) -> bool:
    """Return whether `dataset.path` is a folder with files named for evaluation.

    Args:
        path: `dataset.path`.
        test_path: `dataset.test_path`, a file that is not counted.
    """
    folder = data_folder(path)
    if folder is None:
        return False
    files = data_files(folder, [test_path])
    return any(named_splits(file) == ["eval"] for file in files)
