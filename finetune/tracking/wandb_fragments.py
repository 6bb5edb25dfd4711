"""The fragments of a W&B run: one `.wandb` file for each time that it was opened, joined to one.

W&B begins a new file whenever a run is opened. `wandb sync` sends the files of a run one after the
other, and what the last one says of config, tags and summary takes the place of what was sent
before. So a run that was opened several times (killed and resumed, published at a study's end) is
joined to one file, which W&B shows as it shows a run that was never interrupted.

Each step leaves files that can be joined again, so that a kill loses nothing.
"""

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from finetune.tracking.wandb_arguments import FALLBACK
from finetune.tracking.wandb_file import read_records, write_records
from finetune.tracking.wandb_log import RunLog, read_log, steps_of

_LAST_RECORD_SECONDS = 5
"""How long to wait for the end of a file."""


def fragment_files(directory: Path, run_id: str) -> list[Path]:
    """Return the files of a run below a folder in which W&B has created `wandb/`, by their time."""
    files: list[Path] = []
    for name in (run_id, f"{run_id}{FALLBACK}"):
        for folder in ("wandb", ".wandb"):
            files += (directory / folder).glob(f"*run-*/run-{name}.wandb")
    # The time stands in the folder's name, after `run-` or `offline-run-`.
    return sorted(files, key=lambda file: file.parent.name.removeprefix("offline-"))


def join_finished(directory: Path, run_id: str, is_offline: bool) -> Path | None:
    """Join the fragments of a run that W&B has just finished, if there are several.

    Args and result are those of `join_fragments`.
    """
    files = fragment_files(directory, run_id)
    if not files:
        return None
    wait_until_complete(files[-1])
    for file in files:
        # A sync while the run was open has not sent its end.
        _forget_sync(file)
    is_named = files[0].name == f"run-{run_id}.wandb"
    if len(files) == 1 and is_named and is_offline == _is_offline(files[0]):
        return files[0]
    return join_fragments(directory, run_id, is_offline)


def join_fragments(
    directory: Path, run_id: str, is_offline: bool = False
) -> Path | None:
    """Join all fragments of a run that no process has open.

    Args:
        directory: The folder in which W&B has created `wandb/`.
        run_id: The run's id.
        is_offline: Whether the server lacks the run, or a part of it: `wandb sync` then sends it
            without being told that it was online.

    Returns:
        The one file; None if there is none from which W&B could show a run.
    """
    files = fragment_files(directory, run_id)
    logs = {file: read_log(file) for file in files}
    readable = {file: log for file, log in logs.items() if log is not None}
    for file in files:
        # Killed at once. A file without the run's name would end `wandb sync` for all others.
        if file not in readable:
            shutil.rmtree(file.parent)
    if not readable:
        return None
    target, *later_files = readable
    log = readable[target]
    if later_files or target.name != f"run-{run_id}.wandb":
        for file in later_files:
            _move_files(file.parent / "files", target.parent / "files")
            log = log.followed_by(readable[file])
        target = _replace(target, log, run_id)
    for file in later_files:
        file.unlink(missing_ok=True)
        if file.parent != target.parent:
            shutil.rmtree(file.parent)
    return _rename(target, is_offline)


def _is_offline(file: Path) -> bool:
    return file.parent.name.startswith("offline-")


def wait_until_complete(file: Path) -> None:
    """Wait for the last record of a finished run, which W&B writes from a process of its own."""
    end = time.monotonic() + _LAST_RECORD_SECONDS
    while not any(record.HasField("exit") for record in read_records(file)):
        if time.monotonic() > end:
            return
        time.sleep(0.02)


def _forget_sync(file: Path) -> None:
    """Let the next `wandb sync` send a file whole, though it was sent before."""
    for suffix in (".synced", ".syncstate"):
        file.with_name(file.name + suffix).unlink(missing_ok=True)


def last_step(file: Path) -> int:
    """Return the last step whose metrics are in a file; -1 if there is none."""
    log = read_log(file)
    return max(steps_of(log.body), default=-1) if log is not None else -1


def change_tags(file: Path, tags: Sequence[str]) -> None:
    """Replace the tags of the run in a file."""
    log = read_log(file)
    assert log is not None
    del log.run.run.tags[:]
    log.run.run.tags.extend(tags)
    _replace(file, log, log.run.run.run_id)


def add_session(file: Path, session_file: Path) -> None:
    """Add summary and artifacts to the run in a file, from the file of another, finished one."""
    wait_until_complete(session_file)
    log, session = read_log(file), read_log(session_file)
    assert log is not None
    if session is None:
        return
    run = log.run.run
    for record in session.body:
        if record.HasField("artifact"):
            record.artifact.run_id = run.run_id
            record.artifact.project = run.project
            record.artifact.entity = run.entity
    session.body = [
        record
        for record in session.body
        if record.HasField("summary") or record.HasField("artifact")
    ]
    session.run, session.exit = log.run, None
    _replace(file, log.followed_by(session, resumes=True), run.run_id)


def _replace(file: Path, log: RunLog, run_id: str) -> Path:
    """Write a run's one file beside one of its fragments, and remove what that stands for."""
    run = log.run.run
    run.run_id = run_id
    for record in log.body:
        if record.HasField("artifact"):
            record.artifact.run_id = run_id
    # All of the run is in the file: W&B is to begin it, not to continue it.
    run.resume = run.resumed = False
    run.starting_step = run.runtime = 0
    path = file.with_name(f"run-{run_id}.wandb")
    # Before the change: a sync in between sends the run once more rather than never.
    _forget_sync(path)
    write_records(path, log.records())
    if path != file:
        file.unlink()
    return path


def _rename(file: Path, is_offline: bool) -> Path:
    """Name the folder after the run, and after its mode as `wandb sync` reads it."""
    folder = file.parent
    name = folder.name.removesuffix(FALLBACK)
    if is_offline and not name.startswith("offline-"):
        name = f"offline-{name}"
    if name == folder.name:
        return file
    renamed = folder.with_name(name)
    # Without a file of this run: all of them are joined.
    shutil.rmtree(renamed, ignore_errors=True)
    folder.rename(renamed)
    return renamed / file.name


def _move_files(source: Path, target: Path) -> None:
    for path in sorted(source.rglob("*")):
        if path.is_file():
            moved = target / path.relative_to(source)
            moved.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, moved)
