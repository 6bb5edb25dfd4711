"""The data files of a folder, and the split (train, eval, test) that each file's name tells.

It belongs to the config, and not to `finetune.data`, because the checks of a config need it:
whether a run has rows to evaluate on depends on the names of the files.
"""

import re
from collections.abc import Iterable
from pathlib import Path

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

SPLITS = ("train", "eval", "test")

_SPLIT_OF_WORD = {
    "train": "train", "training": "train",
    "validation": "eval", "valid": "eval", "val": "eval", "dev": "eval",
    "eval": "eval", "evaluation": "eval",
    "test": "test", "testing": "test",
}  # fmt: skip

_WORD_BOUNDARY = re.compile(r"[\W\d_]+|(?<=[a-z])(?=[A-Z])")


def data_folder(path: str) -> Path | None:
    """Return the folder that `dataset.path` names; None for a file, a hub id and `python_docs`."""
    if path == "python_docs":
        return None  # the packaged rows, even where a folder has this name
    folder = Path(path).expanduser()
    return folder if folder.is_dir() else None


def data_files(folder: Path, excluded: Iterable[str | None] = ()) -> list[Path]:
    """Return the files of a folder that can hold rows, ordered by name.

    Args:
        folder: The folder; its subfolders are not searched.
        excluded: Paths of files to leave out, or None.
    """
    excluded_files = {Path(path).expanduser().resolve() for path in excluded if path is not None}
    files = []
    for file in sorted(folder.iterdir()):
        is_data = file.suffix.lower() in SUFFIXES
        if is_data and file.resolve() not in excluded_files:
            files.append(file)
    return files


def named_splits(file: Path) -> list[str]:
    """Return the splits for which a file's name has a word of its own.

    None for `latest.jsonl`, test for `data.test.csv`, train and test for `train_test.json`.
    """
    words = {word.lower() for word in _WORD_BOUNDARY.split(file.stem)}
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
    return any(named_splits(file) == ["eval"] for file in data_files(folder, [test_path]))
