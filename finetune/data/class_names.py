"""Names of classes: data sets keep a class as a number, and its name beside the rows."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.data.types import RawRow
from finetune.errors import ConfigError
from finetune.files.atomic import read_json

ClassNames = dict[str, list[str]]
"""The names of the classes, by column."""


def class_names(rows: object) -> ClassNames:
    """Return the class names that a data set of the `datasets` library has for its columns.

    Args:
        rows: A data set, or any other rows, which have no class names.
    """
    features: Any = getattr(rows, "features", None) or {}
    return {
        column: list(feature.names)
        for column, feature in features.items()
        if type(feature).__name__ == "ClassLabel"
    }


def saved_class_names(folder: Path) -> ClassNames:
    """Return the class names of a data set that `save_to_disk` wrote."""
    return _names_of(read_json(folder / "dataset_info.json").get("features"))


def stored_class_names(metadata: Mapping[bytes, bytes]) -> ClassNames:
    """Return the class names in a Parquet or Arrow file that the `datasets` library wrote.

    Args:
        metadata: That of the file's schema.
    """
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return _names_of(features)


def _names_of(features: Any) -> ClassNames:
    """The class names in the features of a data set, as it is stored."""
    if not isinstance(features, dict):
        return {}
    return {
        column: list(feature["names"])
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }


def name_classes(row: RawRow, names: ClassNames, where: str) -> RawRow:
    """Return a row with the names of its classes in the place of their numbers.

    Args:
        row: The row.
        names: The class names.
        where: The row's place, to begin error messages with.

    Raises:
        ConfigError: A number stands for no class.
    """
    named = dict(row)
    for column, labels in names.items():
        value = row.get(column)
        if isinstance(value, int):
            if not 0 <= value < len(labels):
                classes = ", ".join(labels)
                reason = f"field '{column}' is {value}, which is no class; the classes: {classes}"
                raise ConfigError(f"{where}: {reason}")
            named[column] = labels[value]
    return named
