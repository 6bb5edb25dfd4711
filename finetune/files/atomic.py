"""Files that are written whole or not at all, and errors that name their file."""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_json(path: Path, content: object) -> None:
    """Write a JSON file whole or not at all. NaN and infinities become null: JSON has no word for them."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with name_file_in_errors(path):
            draft.write_text(json.dumps(_plain(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def name_file_in_errors(path: Path) -> Iterator[None]:
    """Name the file in errors that come without one (disk full)."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    except SafetensorError as error:
        raise OSError(f"{error}: {path}") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file, None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _plain(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content
