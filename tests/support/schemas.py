"""The JSON Schemas of docs/schemas, held against files that runs and studies have written."""

import functools
import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

SCHEMAS = Path(__file__).resolve().parents[2] / "docs" / "schemas"
NAMES = ("result", "answer", "confirm")


@functools.cache
def validator(name: str) -> Any:
    schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def check_file(path: Path) -> None:
    """Fail where a file is not as its schema says, or has an entry that the schema lacks."""
    content = json.loads(path.read_text())
    errors = [error.message for error in validator(path.stem).iter_errors(content)]
    assert not errors, f"{path}: {errors}"


def check_written(folder: Path) -> None:
    """Check all such files below a folder; made-up and older ones, without a version, are left."""
    for name in NAMES:
        for path in folder.rglob(f"{name}.json"):
            if '"schema_version"' in path.read_text():
                check_file(path)
