"""W&B runs of finished runs: opened again to change their tags, summary or artifacts."""

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from finetune.console import summary_line
from finetune.files.atomic import read_json, write_json
from finetune.files.lock import file_lock
from finetune.files.run_folder import RunFolder
from finetune.tracking.text_privacy import shows_text
from finetune.tracking.wandb_arguments import (
    OFFLINE_MODES,
    TRACKER,
    quiet_settings,
    recorded_directory,
)
from finetune.tracking.wandb_fragments import (
    add_session,
    change_tags,
    join_finished,
    join_fragments,
)
from finetune.tracking.wandb_metrics import define_metrics
from finetune.tracking.wandb_server import (
    fail,
    finish_run,
    server_failure,
    watch_uploads,
)

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

T = TypeVar("T")

LOCK = ".wandb.lock"
"""File in a run's folder; its holder changes the finished W&B run."""


@contextlib.contextmanager
def reopen_run(folder: RunFolder, uploads: bool = False) -> "Iterator[wandb.Run]":
    """Open the W&B run of a completed run again, to add to its summary, or artifacts.

    Offline, and where the server is away, what is added stands in the run's one file afterwards,
    as if it had been logged before the run's end. After an error in the block nothing is added.

    Args:
        folder: The run's folder, with `tracker.json`.
        uploads: Whether artifacts are added.

    Raises:
        Exception: Whatever W&B raises; OSError if the files of an offline run are gone.
    """
    with file_lock(folder.path / LOCK):
        arguments = read_json(folder.path / TRACKER)
        run = _open_online(folder, arguments, uploads)
        if run is None:
            with _offline_session(folder, arguments) as session:
                yield session
            return
        try:
            yield run
        finally:
            # The run did complete, whatever happens to what is added to it.
            _close_online(run, folder, arguments)


def add_to_run(
    folder: RunFolder, add: "Callable[[wandb.Run], T]", uploads: bool = False
) -> T:
    """Add to the W&B run of a completed run.

    Args:
        folder: The run's folder, with `tracker.json`.
        add: Adds summary values or artifacts to an open W&B run. It is called again, with an
            offline one, if the server fails meanwhile: what it has not taken is nowhere else.
        uploads: Whether artifacts are added.

    Returns:
        What `add` returns.

    Raises:
        Exception: Whatever W&B or `add` raises.
    """
    was_online = is_online(folder)
    with reopen_run(folder, uploads) as run:
        result = add(run)
    if was_online and not is_online(folder):
        with reopen_run(folder, uploads) as run:
            result = add(run)
    return result


def is_online(folder: RunFolder) -> bool:
    """Return whether the server has the W&B run of a run."""
    return bool(read_json(folder.path / TRACKER)["mode"] == "online")


def add_tag(folder: RunFolder, tag: str) -> None:
    """Add a tag to the W&B run of a finished run, if it has one. A failure is a warning."""
    _change_tags(folder, lambda tags: tags if tag in tags else [*tags, tag])


def remove_tag(folder: RunFolder, tag: str) -> None:
    """Remove a tag from the W&B run of a finished run, if it has one. A failure is a warning."""
    _change_tags(folder, lambda tags: [name for name in tags if name != tag])


def _change_tags(folder: RunFolder, change: Callable[[list[str]], list[str]]) -> None:
    if not (folder.path / TRACKER).exists():
        return
    with file_lock(folder.path / LOCK):
        arguments = read_json(folder.path / TRACKER)
        before = arguments["tags"] or []
        tags = change(before)
        if arguments["mode"] == "disabled" or tags == before:
            return
        arguments = {**arguments, "tags": tags}
        try:
            # The tags are an argument of `wandb.init`: opening the run writes them.
            run = _open_online(folder, arguments)
            if run is None:
                change_tags(_only_file(folder, arguments), tags)
            else:
                _close_online(run, folder, arguments)
        except Exception as error:
            reason = summary_line(error)
            log.warning("W&B: %s; the tags of %s are not %s", reason, folder.path, tags)
        else:
            write_json(folder.path / TRACKER, arguments)


def _open_online(
    folder: RunFolder, arguments: dict[str, Any], uploads: bool = False
) -> "wandb.Run | None":
    """Open an online run; None, and it is offline from now on, if its server is away."""
    if arguments["mode"] in OFFLINE_MODES:
        return None
    import wandb

    watch_uploads()
    if not server_failure.is_set():
        settings = quiet_settings(
            arguments["mode"], uploads, shows_text(_config(folder, arguments))
        )
        recorded = ("mode", "project", "entity", "name", "group", "tags", "id")
        given = {name: arguments[name] for name in (*recorded, "job_type", "reinit")}
        directory = recorded_directory(folder, arguments)
        try:
            # Without the config: the server has it.
            run = wandb.init(
                settings=settings,
                dir=str(directory),
                resume="allow",
                **given,
            )
            define_metrics(run, arguments.get("best", {}))
            return run
        except wandb.errors.CommError as error:
            fail(summary_line(error))
    arguments["mode"] = "offline"
    return None


def _close_online(
    run: "wandb.Run", folder: RunFolder, arguments: dict[str, Any]
) -> None:
    """Finish an online run, and join the file of this session to that of the run."""
    finish_run(run, exit_code=0)
    if server_failure.is_set():
        arguments["mode"] = "offline"
    directory = recorded_directory(folder, arguments)
    join_finished(directory, arguments["id"], arguments["mode"] in OFFLINE_MODES)
    write_json(folder.path / TRACKER, arguments)


@contextlib.contextmanager
def _offline_session(
    folder: RunFolder, arguments: dict[str, Any]
) -> "Iterator[wandb.Run]":
    """Open another run, and add to the finished one's file what the block logs to it."""
    import wandb

    file = _only_file(folder, arguments)
    may_show_text = shows_text(_config(folder, arguments))
    with tempfile.TemporaryDirectory() as directory:
        run = wandb.init(
            mode="offline",
            project=arguments["project"],
            dir=directory,
            reinit="create_new",
            settings=quiet_settings("offline", False, may_show_text),
        )
        try:
            yield run
        finally:
            run.finish(exit_code=0)
        (session_file,) = Path(directory).glob("*/*/*.wandb")
        add_session(file, session_file)
    write_json(folder.path / TRACKER, arguments)


def _only_file(folder: RunFolder, arguments: dict[str, Any]) -> Path:
    """Return the file of an offline run. Raises FileNotFoundError if it is gone."""
    directory = recorded_directory(folder, arguments)
    file = join_fragments(directory, arguments["id"], is_offline=True)
    if file is None:
        path = os.path.relpath(directory / "wandb")
        reason = f"no file of run {arguments['id']}"
        raise FileNotFoundError(f"{reason} in {path}")
    return file


def _config(folder: RunFolder, arguments: dict[str, Any]) -> dict[str, Any]:
    # A run of before `tracker.json` held the config has it in `run.json` alone.
    config: dict[str, Any] = (
        arguments.get("config") or read_json(folder.identity)["config"]
    )
    return config
