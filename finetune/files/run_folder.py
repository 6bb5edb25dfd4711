"""The run folder: its lock, its files, its checkpoints."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError
from finetune.files.atomic import name_file_in_errors, write_text
from finetune.files.lock import file_lock
from finetune.json_safe import json_safe

Metrics = dict[str, float]

PROGRESS = "progress.json"
"""The run's state in a checkpoint, next to weights and optimizer.

It is written last: a checkpoint without it is incomplete.
"""


LOCK = ".lock"
"""The lock file of a run folder."""


class FolderHeld(ConfigError):
    """Another live process holds the run's folder."""


class RunFolder:
    """One run's folder: its lock, its metrics line by line, its result.

    The lock is the system's and ends with the process that holds it, so a held lock proves that the
    run's owner is alive.
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
        self._is_locked = False

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock for the block; within a block that holds it already, do nothing.

        Raises:
            FolderHeld: Another process, or another `RunFolder` of this process, holds the folder.
        """
        # To the system, a second lock of this process would be like one of another process.
        if self._is_locked:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(file_lock(self.path / LOCK, wait=False))
            except BlockingIOError:
                raise FolderHeld(
                    f"{self.path}: another process is training in this folder"
                ) from None
            self._is_locked = True
            try:
                yield
            finally:
                self._is_locked = False

    def log(self, step: int, metrics: Metrics) -> None:
        """Append the metrics of an optimizer step as one line."""
        with (
            name_file_in_errors(self._metrics),
            open(self._metrics, "a", encoding="utf-8") as file,
        ):
            line = json.dumps(json_safe({"step": step, **metrics}))
            file.write(line + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Return all complete lines, oldest first; a kill may have cut the last one short."""
        try:
            text = self._metrics.read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        rows = []
        for line in text.splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        return rows

    def rewind(self, step: int) -> None:
        """Drop the metrics after an optimizer step: a run that resumes there logs them again."""
        if not self._metrics.exists():
            return
        lines = []
        for row in self.metrics():
            if row["step"] <= step:
                lines.append(json.dumps(row) + "\n")
        write_text(self._metrics, "".join(lines), single_writer=True)

    def last_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint, None if there is none. Removes incomplete ones."""
        # A kill while a checkpoint was written left it without its last file.
        for path in self.checkpoints.glob("checkpoint-*"):
            if not (path / PROGRESS).exists():
                shutil.rmtree(path)
        checkpoints = checkpoints_in(self.checkpoints)
        return checkpoints[-1] if checkpoints else None

    def clear(self) -> None:
        """Remove everything that an earlier run left in the folder, except its log."""
        for path in (self.adapter, self.checkpoints):
            shutil.rmtree(path, ignore_errors=True)
        for path in self._files:
            path.unlink(missing_ok=True)

    @property
    def names(self) -> set[str]:
        """The names of all that a run writes to its folder, except its log."""
        return {path.name for path in (self.adapter, self.checkpoints, *self._files)}

    @property
    def _files(self) -> tuple[Path, ...]:
        reports = (self.result, self.samples, self.test_rows, self._metrics)
        return (self.identity, *reports)

    def best(self, step: int) -> Path:
        """Return the folder of the best adapter so far, evaluated at an optimizer step."""
        return self.checkpoints / f"best-{step}"


def checkpoints_in(folder: Path) -> list[Path]:
    """Return all complete checkpoints of a `checkpoints/` folder, oldest first."""
    complete = (
        path for path in folder.glob("checkpoint-*") if (path / PROGRESS).exists()
    )
    # By number: as text, checkpoint-100 would come before checkpoint-20.
    return sorted(complete, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """Return the optimizer step at which a checkpoint was written."""
    return int(checkpoint.name.split("-")[1])


def remove_old_checkpoints(folder: Path, keep: int | None, best_step: int) -> None:
    """Remove outdated checkpoints and the adapters of evaluations that are no longer the best.

    Args:
        folder: A run's `checkpoints/` folder.
        keep: How many of the newest checkpoints stay; None or 0: all.
        best_step: The optimizer step of the best evaluation.
    """
    outdated = checkpoints_in(folder)[:-keep] if keep else []
    for path in folder.glob("best-*"):
        if path.name != f"best-{best_step}":
            outdated.append(path)
    for path in outdated:
        shutil.rmtree(path)


REFUSED = "refused.jsonl"
"""File in a sweep's folder: the jobs that were refused, with the reasons."""

HYDRA_FILES = {".hydra", "train.log"}
"""What Hydra writes into the folder of a run before the run's own code starts."""


TRACKER_FILES = {"tensorboard", "wandb", "tracker.json", "mlflow.json", "trackio.json"}
"""What trackers write into the folder of a run, from which they go on."""


def is_new(folder: RunFolder) -> bool:
    """Return whether Hydra has just made a folder: no file of a user or an earlier start is there.

    An earlier start would have left lines in `train.log`, which Hydra appends to.
    """
    log_file = folder.path / "train.log"
    has_log_lines = log_file.exists() and log_file.stat().st_size > 0
    return not has_log_lines and _file_names(folder.path) <= HYDRA_FILES


def discard_if_untouched(folder: str | Path) -> None:
    """Remove a folder that Hydra made for a run that never began, and its empty parents."""
    _discard(Path(folder), HYDRA_FILES)


def discard_refused(folder: RunFolder) -> None:
    """Remove a new folder (`is_new`) whose run was refused before it wrote `run.json`.

    It stays where another process has begun a run in it meanwhile.
    """
    with contextlib.suppress(FolderHeld), folder.locked():
        names = HYDRA_FILES | {LOCK, folder.result.name}
        _discard(folder.path, names)


def _discard(path: Path, names: set[str]) -> None:
    """Remove a folder that holds nothing but these names, and its empty parents."""
    # `hydra.run.dir=.` trains in the working directory, which stays.
    if path.resolve() != Path.cwd() and _file_names(path) <= names:
        shutil.rmtree(path)
        _remove_empty(path.parent)


def _file_names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def record_refused(sweep_folder: Path, number: int, reason: str) -> None:
    """Record why a job of a sweep was refused, as its run folder is removed.

    Args:
        sweep_folder: The sweep's folder.
        number: The job's number.
        reason: Why, in one line.
    """
    # Appended in one call, because jobs may run in several processes.
    with open(sweep_folder / REFUSED, "a", encoding="utf-8") as file:
        file.write(json.dumps({"job": number, "reason": reason}) + "\n")


def refused_jobs(sweep_folder: Path) -> dict[int, str]:
    """Return why jobs of a sweep were refused, by their numbers."""
    path = sweep_folder / REFUSED
    if not path.exists():
        return {}
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line["job"]: line["reason"] for line in lines}


def discard_multirun(folder: Path) -> None:
    """Remove the folder of a sweep in which no job left a run, and its empty parents."""
    names = _file_names(folder) if folder.is_dir() else set()
    if "multirun.yaml" in names and names <= {"multirun.yaml", REFUSED}:
        shutil.rmtree(folder)
        _remove_empty(folder.parent)


def _remove_empty(path: Path) -> None:
    """Remove a folder and its parents as long as they are empty and below the working directory."""
    # `rmdir` refuses a folder that is not empty: it holds other runs.
    with contextlib.suppress(OSError):
        absolute_path = path.resolve()
        working_directory = Path.cwd()
        for folder in (absolute_path, *absolute_path.parents):
            if working_directory not in folder.parents:
                break
            folder.rmdir()
