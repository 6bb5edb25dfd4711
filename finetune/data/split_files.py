"""Which files of a folder are read for which split: train, eval or test.

Fractions of rows are taken in `rows`.
"""

import logging
from pathlib import Path

from finetune.config.data_folder import (
    ANY_FILE,
    SPLITS,
    data_files,
    data_folder,
    named_splits,
)
from finetune.config.sections.dataset import DatasetSettings
from finetune.errors import refusal

log = logging.getLogger(__name__)


def files_by_split(settings: DatasetSettings, path: str) -> dict[str, list[Path]]:
    """Return the files of a folder by split; empty if the path is no folder.

    Files without a split in their name are for training. A file that `eval_path` or `test_path`
    names is left to that key. If any file is named for a split, one log line says which file is
    used for what.

    Args:
        settings: The keys that name held-out rows.
        path: `dataset.path`, or one of its paths.

    Raises:
        ConfigError: The folder has no file to train on, or a file is named for two splits.
    """
    key = "dataset.path"
    folder = data_folder(path)
    if folder is None:
        return {}
    all_files = data_files(folder)
    if not all_files:
        raise refusal(key, path, f"the folder has no {ANY_FILE}")
    files: dict[str, list[Path]] = {split: [] for split in SPLITS}
    unnamed = []
    for file in data_files(folder, [settings.eval_path, settings.test_path]):
        split = _named_split(key, path, file)
        if split is None:
            unnamed.append(file)
        files[split or "train"].append(file)
    if not files["train"]:
        reason = f"the folder has {file_names(all_files)}, and no file to train on"
        raise refusal(key, path, f"{reason}; {key}={all_files[0]} trains on it")
    if len(unnamed) < sum(map(len, files.values())):
        _log_splits(settings, path, files, unnamed)
    return files


def files_for_split(split: str, key: str, path: str) -> list[Path] | None:
    """Return the files to read from a path that is given for one split.

    Args:
        split: `eval` or `test`.
        key: The config key of the path, for messages.
        path: Any path that `dataset.path` may be.

    Returns:
        A folder's files that are named for the split, or all its files if none is. None if the path
        is no folder.

    Raises:
        ConfigError: A file is named for two splits.
    """
    folder = data_folder(path)
    if folder is None:
        return None
    files = data_files(folder)
    split_of = {file: _named_split(key, path, file) for file in files}
    named = [file for file in files if split_of[file] == split]
    if named and len(named) < len(files):
        names = file_names(named)
        log.info(
            "data: %s=%s: %s only, named for it, of %d files",
            key,
            path,
            names,
            len(files),
        )
    elif not named and any(split_of.values()):
        log.info(
            "data: %s=%s: all %d files, as none is named %s",
            key,
            path,
            len(files),
            split,
        )
    return named or files


def file_names(files: list[Path]) -> str:
    """Return the names of files for a message: the first three, and how many follow."""
    names = ", ".join(file.name for file in files[:3])
    hidden = len(files) - 3
    return f"{names} and {hidden} more" if hidden > 0 else names


def _named_split(key: str, path: str, file: Path) -> str | None:
    """The split that a file is named for, if any. Raises ConfigError where it names several."""
    splits = named_splits(file)
    if len(splits) > 1:
        reason = f"{file.name} is named for {' and '.join(splits)}; give it the name of one split"
        raise refusal(key, path, reason)
    return splits[0] if splits else None


def _log_splits(
    settings: DatasetSettings,
    folder: str,
    files: dict[str, list[Path]],
    unnamed: list[Path],
) -> None:
    """Log which rows are used for which split, and which files are not used."""
    train = f"train = {file_names(files['train'])}"
    if unnamed and len(unnamed) < len(files["train"]):
        train += f" ({file_names(unnamed)}: no split in the name)"
    phrases = [train]
    for split in ("eval", "test"):
        path = getattr(settings, f"{split}_path")
        fraction = settings.held_out_fraction(split)
        if path is not None:
            unused = f" (not used: {file_names(files[split])})" if files[split] else ""
            phrases.append(f"{split} = dataset.{split}_path={path}{unused}")
        elif files[split]:
            phrases.append(f"{split} = {file_names(files[split])}")
        elif fraction > 0:
            key = f"dataset.{split}_fraction"
            phrases.append(f"{split} = {fraction:.3g} of the training rows ({key})")
    log.info("data: %s: %s", folder, "; ".join(phrases))
