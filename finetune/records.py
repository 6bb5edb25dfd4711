"""What a run leaves in its folder, written so that a kill at any instant loses nothing that was finished."""

import contextlib
import fcntl
import functools
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from finetune.config import ConfigError

Metrics = dict[str, float]

RECORDED_PACKAGES = (
    "accelerate", "bitsandbytes", "datasets", "hydra-core", "numpy", "optuna", "peft", "tokenizers", "torch",
    "transformers", "trl", "wandb",
)  # fmt: skip


def write_json(path: Path, content: object) -> None:
    """Write a JSON file whole or not at all. NaN and infinities become null: JSON has no word for them."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with named(path):
            draft.write_text(json.dumps(_plain(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
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
        with named(self._metrics), open(self._metrics, "a", encoding="utf-8") as lines:
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
    return sorted(whole, key=step_of)


def step_of(checkpoint: Path) -> int:
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


@functools.cache
def versions() -> dict[str, str]:
    """Python's version and those of the packages that a result depends on."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in RECORDED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


@functools.cache
def git_commit() -> str | None:
    """The commit of the checkout that this code runs from, None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):
        asked = subprocess.run(command, capture_output=True, text=True)
        if asked.returncode == 0:
            return asked.stdout.strip()
    return None


def reset_peak_memory() -> None:
    """Count the peak anew from here: a process may train several runs."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux has it, where the system allows it
        Path("/proc/self/clear_refs").write_text("5")


def resident_memory_bytes() -> int:
    """What this process has of the host's memory now; 0 where the system does not tell."""
    return _status("VmRSS")


def _status(name: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def peak_memory_bytes() -> int:
    """The most memory that this process had: on the GPU if there is one, else resident in the host's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    found = _status("VmHWM")
    if found:
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Stopwatch:
    """Seconds of what is measured, apart from what is not: evaluations, checkpoints."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        return elapsed
