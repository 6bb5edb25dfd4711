"""Sources of raw rows: what `dataset.path` names, a file, a hub data set or `python_docs`."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.compat import datasets_offline
from finetune.config.data_folder import SUFFIXES
from finetune.config.sections.dataset import DatasetSettings
from finetune.data.python_docs import question_answer_pairs
from finetune.data.readers import read_file
from finetune.data.types import BadRow, RawRow
from finetune.errors import ConfigError, refusal
from finetune.files.hub import HUB_TIMEOUT, ask_hub


@dataclass(frozen=True)
class Source:
    """Raw rows of one file or data set."""

    name: str
    """The file or data set, for error messages."""
    rows: Iterable[RawRow | BadRow]
    commit: str | None = None
    """The commit of a data set on the hub."""


def open_source(key: str, path: str, settings: DatasetSettings) -> Source:
    """Open what a path names, if it is no folder.

    Args:
        key: The config key of the path, for error messages.
        path: `python_docs`, a file, or a hub id as `owner/name`.
        settings: Its `name` and `split` choose among the rows of a hub data set.

    Raises:
        ConfigError: There is no such file or data set.
    """
    if path == "python_docs":
        return Source(path, question_answer_pairs())
    file = Path(path).expanduser()
    if file.is_file():
        return Source(path, read_file(key, file))
    looks_local = file.suffix in SUFFIXES or path.startswith((".", "/", "~"))
    if looks_local or path.count("/") != 1:
        allowed = f"python_docs, a hub id (owner/name), a {' '.join(SUFFIXES)} file, a folder"
        raise refusal(key, path, f"no such file or folder; allowed: {allowed}")
    return Source(path, _hub_rows(key, path, settings.name, settings.split))


def open_files(key: str, folder: str, files: list[Path]) -> list[Source]:
    """Open files of a folder.

    Args:
        key: The config key of the folder, for error messages.
        folder: The folder's path, for error messages.
        files: The files to read, in order.

    Raises:
        ConfigError: There are none.
    """
    if not files:
        raise refusal(key, folder, f"the folder has no {' '.join(SUFFIXES)} file")
    return [Source(str(file), read_file(key, file)) for file in files]


def _hub_rows(key: str, path: str, name: str | None, split: str) -> Iterable[RawRow]:
    """The rows of a data set on the hub, from its cache if the hub does not answer."""
    from huggingface_hub import HfApi

    def load() -> Iterable[dict[str, Any]]:
        from datasets import load_dataset

        rows: Iterable[dict[str, Any]] = load_dataset(path, name, split=split)
        return rows

    def ask() -> Iterable[dict[str, Any]]:
        HfApi().dataset_info(path, timeout=HUB_TIMEOUT)
        return load()

    def in_cache() -> Iterable[dict[str, Any]]:
        with datasets_offline():
            return load()

    instead = f"{key}=FILE takes a .jsonl, .csv or .parquet file from this machine"
    try:
        return ask_hub(key, path, ask, in_cache, instead)
    except ConfigError:
        raise
    except ValueError as error:  # of an unknown split or name; the message lists those that exist
        raise ConfigError(f"{key}={path}: {error}") from None
