"""The data files of a folder, and the part (train, eval, test) that each is named for."""

import re
from collections.abc import Iterable
from pathlib import Path

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


_PARTS = {
    "train": ("train", "training"),
    "eval": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}


_PART_OF_WORD = {word: part for part, words in _PARTS.items() for word in words}


_WORD_BOUNDARY = re.compile(r"[\W\d_]+|(?<=[a-z])(?=[A-Z])")


def data_folder(path: str) -> Path | None:
    """The folder that a path is; None for a file, a hub id and `python_docs`."""
    folder = Path(path).expanduser()
    return folder if path != "python_docs" and folder.is_dir() else None


def data_files(folder: Path, excluded: Iterable[str | None] = ()) -> list[Path]:
    """The files of a folder that hold rows, in the order of their names, without those that are given elsewhere."""
    elsewhere = {Path(path).expanduser().resolve() for path in excluded if path is not None}
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    return [file for file in files if file.resolve() not in elsewhere]


def named_parts(file: Path) -> list[str]:
    """The parts that a file's name has a whole word for: none for `latest.jsonl`, test for `data.test.csv`."""
    words = {word.lower() for word in _WORD_BOUNDARY.split(file.stem)}
    return [part for part in _PARTS if any(_PART_OF_WORD.get(word) == part for word in words)]


def has_evaluation_files(path: str, test_path: str | None) -> bool:
    """Whether a path is a folder with files that are named for evaluation, other than the test rows' own file."""
    folder = data_folder(path)
    return folder is not None and any(named_parts(file) == ["eval"] for file in data_files(folder, [test_path]))
