"""Sources of raw rows: what `dataset.path` names, a file, a hub data set or `python_docs`."""

import functools
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.compat import datasets_offline
from finetune.config.data_folder import (
    ANY_FILE,
    file_type,
    is_remote,
    is_saved_dataset,
    local_path,
)
from finetune.config.sections.dataset import DatasetSettings
from finetune.data.class_names import (
    ClassNames,
    class_names,
    saved_class_names,
    stored_class_names,
)
from finetune.data.python_docs import FAMILY, question_answer_pairs
from finetune.data.readers.arrow_rows import schema_metadata
from finetune.data.readers.cells import CHAT_COLUMNS, parse_cells
from finetune.data.readers.file import DataFile
from finetune.data.readers.identity import file_identity
from finetune.data.readers.read import read_file
from finetune.data.types import BadRow, RawRow
from finetune.errors import ConfigError, refusal
from finetune.files.hub import HUB_TIMEOUT, ask_hub

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Source:
    """Raw rows of one file or data set."""

    name: str
    """The file or data set, for error messages."""
    rows: Iterable[RawRow]
    """With `dataset.on_bad_row=skip` a `BadRow` stands for each row that can't be read; else the
    first one raises ConfigError."""
    identity: str | None
    """A hash of its content, by which its rows are found in the cache; None: not known."""
    commit: str | None = None
    """The commit of a data set on the hub, where it is known."""
    class_names: ClassNames = field(default_factory=dict)
    """The names of classes that columns hold as numbers."""
    group_column: str | None = None
    """The column that says which rows belong together unless `dataset.group_by` names another."""


@functools.cache
def python_docs() -> list[dict[str, str]]:
    """Return the rows of `python_docs`, collected once in a process: it takes half a second."""
    return question_answer_pairs()


def open_source(key: str, path: str, settings: DatasetSettings) -> Source:
    """Open what a path names, if it is no folder of files.

    Args:
        key: The config key of the path, for error messages.
        path: `python_docs`, a file or its URL, a saved data set, or a hub id as `owner/name`.
        settings: Its `name`, `split` and `revision` choose among the rows of a hub data set.

    Raises:
        ConfigError: There is no such file or data set.
    """
    if path == "python_docs":
        families_identity = f"{sys.version} with families"
        return Source(path, _python_docs_rows(), families_identity, group_column=FAMILY)
    file = local_path(path)
    if is_remote(path) or os.path.isfile(file) or is_saved_dataset(file):
        return _open_file(key, path, settings)
    looks_local = any(file_type(path)) or path.startswith((".", "/", "~", "file://"))
    if looks_local or path.count("/") != 1:
        allowed = f"python_docs, a hub id (owner/name), a {ANY_FILE}, a folder"
        raise refusal(key, path, f"no such file or folder; allowed: {allowed}")
    dataset, commit = _hub_dataset(key, path, settings)
    rows = _checked(key, path, dataset, settings)
    identity = None if commit is None else f"{commit} {settings.name} {settings.split}"
    return Source(
        path,
        rows,
        identity,
        commit,
        class_names(dataset),
    )


def open_files(
    key: str,
    folder: str,
    files: list[Path],
    settings: DatasetSettings,
) -> list[Source]:
    """Open files of a folder.

    Args:
        key: The config key of the folder, for error messages.
        folder: The folder's path, for error messages.
        files: The files to read, in order.
        settings: The encoding of text files, and what happens to bad rows.

    Raises:
        ConfigError: There are none.
    """
    if not files:
        raise refusal(key, folder, f"the folder has no {ANY_FILE}")
    return [_open_file(key, str(file), settings) for file in files]


def _open_file(key: str, name: str, settings: DatasetSettings) -> Source:
    identity = file_identity(DataFile(name))
    file_rows = _read_unchanged(key, name, settings, identity)
    rows = _checked(key, name, file_rows, settings)
    folder = local_path(name)
    if is_saved_dataset(folder):
        names = saved_class_names(folder)
    else:
        names = stored_class_names(schema_metadata(DataFile(name)))
    return Source(
        name,
        rows,
        identity,
        class_names=names,
    )


def _read_unchanged(
    key: str, name: str, settings: DatasetSettings, identity: str | None
) -> Iterator[RawRow]:
    """Yield the rows of a file, which are kept in the cache under its identity.

    Raises:
        ConfigError: The file has another identity when all of it is read.
    """
    yield from read_file(key, name, settings.encoding)
    if file_identity(DataFile(name)) != identity:
        raise refusal(key, name, "the file changed while it was read; start again")


def _python_docs_rows() -> Iterator[RawRow]:
    yield from python_docs()


def _checked(
    key: str,
    name: str,
    rows: Iterable[RawRow],
    settings: DatasetSettings,
) -> Iterator[RawRow]:
    """Yield rows with their cells of JSON parsed; a row that can't be read is refused or yielded.

    Raises:
        ConfigError: A row can't be read, and `dataset.on_bad_row` is `refuse`.
    """
    for row in parse_cells(rows, _columns_of_json(settings)):
        if isinstance(row, BadRow) and settings.on_bad_row == "refuse":
            raise refusal(key, name, row.reason)
        yield row


def _columns_of_json(settings: DatasetSettings) -> set[str]:
    """The columns in which a text that is JSON stands for its value.

    They are those of chats by their usual names and by `dataset.columns`, without the columns that
    are used as texts.
    """
    columns = settings.columns
    chats = {
        columns[name] for name in ("messages", "tools", "history") if name in columns
    }
    texts = {
        columns[name] for name in ("prompt", "completion", "system") if name in columns
    }
    return (CHAT_COLUMNS - {settings.text_field} - texts) | chats


def _hub_dataset(
    key: str, path: str, settings: DatasetSettings
) -> tuple[Iterable[RawRow], str | None]:
    """A data set on the hub and its commit, from its cache if the hub does not answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    revision = settings.revision

    def load() -> "Dataset":
        from datasets import load_dataset

        return load_dataset(
            path,
            settings.name,
            split=settings.split,
            revision=revision,
        )

    def ask() -> "tuple[Dataset, str | None, bool]":
        try:
            info = HfApi().dataset_info(path, revision=revision, timeout=HUB_TIMEOUT)
        except RevisionNotFoundError:
            reason = f"{path} has no such branch, tag or commit"
            raise refusal("dataset.revision", revision, reason) from None
        dataset = load()
        return dataset, _cached_commit(dataset) or info.sha, False

    def in_cache() -> "tuple[Dataset, str | None, bool]":
        with datasets_offline():
            dataset = load()
        return dataset, _cached_commit(dataset), True

    instead = f"{key}=FILE takes a file from this machine"
    try:
        dataset, commit, is_cached = ask_hub(key, path, ask, in_cache, instead)
    except ConfigError:
        raise
    except (
        ValueError
    ) as error:  # of an unknown split or name; the message lists those that exist
        raise ConfigError(f"{key}={path}: {' '.join(str(error).split())}") from None
    if is_cached and revision is not None:
        _require_revision(path, revision, commit)
    return dataset, commit


def _cached_commit(dataset: "Dataset") -> str | None:
    """The commit of a data set, by the folder of the `datasets` cache that holds its rows."""
    for file in dataset.cache_files:
        folder = Path(file["filename"]).parent.name
        if re.fullmatch("[0-9a-f]{40}", folder):
            return folder
    return None


def _require_revision(path: str, revision: str, commit: str | None) -> None:
    """Refuse a cached data set that is of another revision, as `datasets` returns the latest one.

    Raises:
        ConfigError: The cached commit is another one, or the revision's commit is not known.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    reference = Path(
        HF_HUB_CACHE,
        f"datasets--{path.replace('/', '--')}",
        "refs",
        revision,
    )
    wanted = reference.read_text().strip() if reference.is_file() else revision
    if commit is None or not commit.startswith(wanted):
        reason = (
            f"the hub can't be reached, and the cache holds commit {commit} of {path}"
        )
        raise refusal("dataset.revision", revision, reason)
