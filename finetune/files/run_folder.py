"""The run folder: its lock, its files, its checkpoints."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError
from finetune.files.atomic import _plain, name_file_in_errors

Metrics = dict[str, float]


class FolderHeld(ConfigError):
    """Another process, which lives, holds a run's folder."""


class RunFolder:
    """One run's folder: its lock, its metrics line by line, its result.

    The lock is the system's (`flock`): it is held as long as the process lives and no longer, so a held
    lock tells that the run's owner is alive.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.adapter = self.path / "adapter"
        self.checkpoints = self.path / "checkpoints"
        self.identity = self.path / "run.json"
        self.result = self.path / "result.json"
        self.samples = self.path / "samples.json"
        self.test_rows = self.path / "test_rows.json"
        self._metrics = self.path / "metrics.jsonl"
        self._held = False

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder; what is held already stays so. Raises FolderHeld if another process holds it."""
        if self._held:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FolderHeld(f"{self.path}: another process is training in this folder") from None
            self._held = True
            try:
                yield
            finally:
                self._held = False

    def log(self, step: int, metrics: Metrics) -> None:
        """Append metrics of an optimizer step as one line."""
        with name_file_in_errors(self._metrics), open(self._metrics, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(_plain({"step": step, **metrics})) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All lines that are whole; a kill may have torn the last."""
        if not self._metrics.exists():
            return []
        rows = []
        for line in self._metrics.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        return rows

    def rewind(self, step: int) -> None:
        """Drop what was logged after a step: the run goes on from its checkpoint there and logs it again."""
        if not self._metrics.exists():
            return
        kept = [row for row in self.metrics() if row["step"] <= step]
        draft = self._metrics.with_suffix(".draft")
        draft.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(draft, self._metrics)

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end; those that a kill cut short are removed."""
        for path in self.checkpoints.glob("checkpoint-*"):
            if not (path / PROGRESS).exists():
                shutil.rmtree(path)
        return next(iter(reversed(checkpoints_in(self.checkpoints))), None)

    def clear(self) -> None:
        """Begin anew: what a run has left goes, but for its log."""
        for path in (self.adapter, self.checkpoints):
            shutil.rmtree(path, ignore_errors=True)
        for path in (self.identity, self.result, self.samples, self.test_rows, self._metrics):
            path.unlink(missing_ok=True)

    def best(self, step: int) -> Path:
        """Where the adapter of the best evaluation so far is kept."""
        return self.checkpoints / f"best-{step}"


PROGRESS = "progress.json"
"""The run's state beside weights and optimizer; written last into a checkpoint."""


def checkpoints_in(folder: Path) -> list[Path]:
    """All checkpoints that were written to their end, the oldest first."""
    whole = (path for path in folder.glob("checkpoint-*") if (path / PROGRESS).exists())
    return sorted(whole, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint was written at."""
    return int(checkpoint.name.split("-")[1])


def remove_old_checkpoints(folder: Path, keep: int | None, best_step: int) -> None:
    """Remove all but the newest checkpoints (None: keep all), and what was once the best."""
    outdated = checkpoints_in(folder)[:-keep] if keep else []
    for path in [*outdated, *(path for path in folder.glob("best-*") if path.name != f"best-{best_step}")]:
        shutil.rmtree(path)


def discard_if_untouched(folder: str | Path) -> None:
    """Remove a folder that Hydra made for a run that never began, and its empty parents."""
    path = Path(folder)
    if path.resolve() == Path.cwd() or not {entry.name for entry in path.iterdir()} <= {".hydra", "train.log"}:
        return
    shutil.rmtree(path)
    _remove_empty(path.parent)


def discard_multirun(folder: Path) -> None:
    """Remove a sweep's folder in which no job has left anything, and its empty parents."""
    if folder.is_dir() and {entry.name for entry in folder.iterdir()} == {"multirun.yaml"}:
        shutil.rmtree(folder)
        _remove_empty(folder.parent)


def _remove_empty(path: Path) -> None:
    """Remove a folder below the working directory if it is empty, and its parents that are empty then."""
    with contextlib.suppress(OSError):  # not empty: another run's
        for folder in (path.resolve(), *path.resolve().parents):
            if folder == Path.cwd() or not folder.is_relative_to(Path.cwd()):
                break
            folder.rmdir()
