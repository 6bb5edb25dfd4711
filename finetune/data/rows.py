"""Rows of a run: read, formatted, split. Imports neither torch nor transformers."""

import logging
import random
from collections.abc import Iterable
from pathlib import Path

from finetune.config.data_folder import SUFFIXES, data_files, data_folder, named_parts
from finetune.config.schema import DatasetSettings
from finetune.data.formats import FORMATS, detect_format
from finetune.data.readers import _read_file, open_sources
from finetune.data.types import Row, Rows, fingerprint
from finetune.errors import refusal

log = logging.getLogger(__name__)


def load_rows(settings: DatasetSettings) -> Rows:
    """Read and split the data set. Raises ConfigError that names the key, and the line or row, of what is wrong."""
    dropped: dict[str, int] = {}
    files = _files_by_part(settings)
    pool = _read_formatted("dataset.path", settings.path, settings, dropped, files.get("train"))
    random.Random(f"split {settings.split_seed}").shuffle(pool)

    total = len(pool)
    # The test rows first: no other fraction changes which rows these are.
    test = _held_out("test", settings, files.get("test"), pool, total, dropped)
    evaluation = _held_out("eval", settings, files.get("eval"), pool, total, dropped)
    seen = {fingerprint(row) for row in pool}
    evaluation = _unseen("eval", settings, files.get("eval"), evaluation, seen, dropped)
    test = _unseen("test", settings, files.get("test"), test, seen, dropped)
    train = pool[: settings.limit]
    if not train:
        raise refusal("dataset.path", settings.path, "no rows are left to train on")
    _say_dropped(dropped)
    if len(train) < len(pool):
        log.info("data: training on %s of %s rows (dataset.limit)", f"{len(train):,}", f"{len(pool):,}")
    return Rows(train, evaluation, test, dropped)


def load_all_rows(key: str, settings: DatasetSettings) -> list[Row]:
    """Every row of `path`, none held out; of a folder those of its test files, where it has any.

    Args:
        key: What errors call the path.
        settings: The path, and how its rows are read.

    Raises:
        ConfigError: The path, a line or a row can't be read.
    """
    dropped: dict[str, int] = {}
    rows = _read_formatted(key, settings.path, settings, dropped, _files_of_part("test", key, settings.path))
    _say_dropped(dropped)
    return rows


def _say_dropped(dropped: dict[str, int]) -> None:
    for reason, count in dropped.items():
        log.info("data: left out %d %s", count, reason)


def _held_out(
    part: str, settings: DatasetSettings, files: list[Path] | None, pool: list[Row], total: int, dropped: dict[str, int]
) -> list[Row]:
    """Rows from the user's own file, from the folder's files of that name, or a share that is taken out of the pool."""
    path: str | None = getattr(settings, f"{part}_path")
    fraction: float = getattr(settings, f"{part}_fraction")
    if path is not None:
        key = f"dataset.{part}_path"
        return _read_formatted(key, path, settings, dropped, _files_of_part(part, key, path))
    if files:
        return _read_formatted("dataset.path", settings.path, settings, dropped, files)
    count = round(fraction * total)
    if fraction > 0 and not 0 < count < len(pool):
        raise refusal(f"dataset.{part}_fraction", fraction, f"takes {count} of {total} rows; 0 means none wanted")
    taken, pool[:] = pool[:count], pool[count:]
    return taken


def _unseen(
    part: str,
    settings: DatasetSettings,
    files: list[Path] | None,
    rows: list[Row],
    seen: set[str],
    dropped: dict[str, int],
) -> list[Row]:
    """Held-out rows that stand nowhere else, so that nothing is measured on what was trained on."""
    kept = []
    for row in rows:
        mark = fingerprint(row)
        if mark not in seen:
            seen.add(mark)
            kept.append(row)
    if len(kept) < len(rows):
        dropped[f"{part} rows that also stand in training or twice"] = len(rows) - len(kept)
    if rows and not kept:
        if getattr(settings, f"{part}_path") is None and files:
            reason = f"all {len(rows)} rows of {_names(files)} also stand in training"
            raise refusal("dataset.path", settings.path, reason)
        key = f"{part}_path" if getattr(settings, f"{part}_path") else f"{part}_fraction"
        raise refusal(f"dataset.{key}", getattr(settings, key), f"all {len(rows)} rows also stand in training")
    return kept


def _files_by_part(settings: DatasetSettings) -> dict[str, list[Path]]:
    """The files of the folder that `dataset.path` is, by the part that they are read for; empty for anything else.

    Files without a part's name train. A file that `eval_path` or `test_path` gives is left to that. What became of
    the files is said in one line where any has a part's name.
    """
    key, path = "dataset.path", settings.path
    folder = data_folder(path)
    if folder is None:
        return {}
    present = data_files(folder)
    if not present:
        raise refusal(key, path, f"the folder has no {' '.join(SUFFIXES)} file")
    parts = {
        file: _named_part(key, path, file) for file in data_files(folder, [settings.eval_path, settings.test_path])
    }
    files: dict[str, list[Path]] = {"train": [], "eval": [], "test": []}
    for file, part in parts.items():
        files[part or "train"].append(file)
    if not files["train"]:
        reason = f"the folder has {_names(present)}, and no file to train on"
        raise refusal(key, path, f"{reason}; {key}={present[0]} trains on it")
    if any(parts.values()):
        _say_files(settings, files, [file for file, part in parts.items() if part is None])
    return files


def _say_files(settings: DatasetSettings, files: dict[str, list[Path]], unnamed: list[Path]) -> None:
    """Which files became which part, and which are not used, in one line."""
    pieces = [f"train = {_names(files['train'])}"]
    if unnamed and len(unnamed) < len(files["train"]):
        pieces[0] += f" ({_names(unnamed)}: no part in the name)"
    for part in ("eval", "test"):
        path, fraction = getattr(settings, f"{part}_path"), getattr(settings, f"{part}_fraction")
        if path is not None:
            unused = f" (not used: {_names(files[part])})" if files[part] else ""
            pieces.append(f"{part} = dataset.{part}_path={path}{unused}")
        elif files[part]:
            pieces.append(f"{part} = {_names(files[part])}")
        elif fraction > 0:
            pieces.append(f"{part} = {fraction:.3g} of the training rows (dataset.{part}_fraction)")
    log.info("data: %s: %s", settings.path, "; ".join(pieces))


def _files_of_part(part: str, key: str, path: str) -> list[Path] | None:
    """Of a folder that is given for one part its files of that name, else all; None for anything but a folder."""
    folder = data_folder(path)
    if folder is None:
        return None
    files = data_files(folder)
    parts = {file: _named_part(key, path, file) for file in files}
    named = [file for file in files if parts[file] == part]
    if named and len(named) < len(files):
        log.info("data: %s=%s: %s only, named for it, of %d files", key, path, _names(named), len(files))
    elif not named and any(parts.values()):
        log.info("data: %s=%s: all %d files, as none is named %s", key, path, len(files), part)
    return named or files


def _named_part(key: str, path: str, file: Path) -> str | None:
    """The part that a file is named for, None where its name says none. Raises ConfigError where it says two."""
    parts = named_parts(file)
    if len(parts) > 1:
        raise refusal(key, path, f"{file.name} is named for {' and '.join(parts)}; give it the name of one part")
    return parts[0] if parts else None


def _names(files: list[Path]) -> str:
    """Files by their names, the first three of many."""
    shown = [file.name for file in files[:3]]
    rest = len(files) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def _read_formatted(
    key: str, path: str, settings: DatasetSettings, dropped: dict[str, int], files: list[Path] | None = None
) -> list[Row]:
    """All rows of one source in one form: of these files of a folder, or of whatever else the path stands for.

    Rows with nothing to learn from are left out and counted.
    """
    rows: list[Row] = []
    total = 0
    format_name: str = settings.format
    sources = open_sources(key, path, settings) if files is None else _read_files(key, path, files)
    for source, raw in sources:
        for number, row in enumerate(raw, start=1):
            if format_name == "auto":  # what the first row is, all are
                format_name = detect_format(key, source, row, settings.text_field)
            formatted = FORMATS[format_name](row, f"{key}={source}: row {number}", settings.text_field)
            if formatted is not None:
                rows.append(formatted)
            total += 1
    shown = path if files is None else f"{path} ({_names(files)})"
    if not total:
        raise refusal(key, shown, "holds no rows")
    if len(rows) < total:
        reason = f"rows of {shown} with nothing to learn from"
        dropped[reason] = dropped.get(reason, 0) + total - len(rows)
    if not rows:
        raise refusal(key, shown, f"no rows are left: none of {total} has any text to learn from")
    return rows


def _read_files(key: str, path: str, files: list[Path]) -> list[tuple[str, Iterable[Row]]]:
    """The rows of a folder's files, each by the name that errors call it."""
    if not files:
        raise refusal(key, path, f"the folder has no {' '.join(SUFFIXES)} file")
    return [(str(file), _read_file(key, file)) for file in files]
