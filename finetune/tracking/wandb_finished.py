"""W&B runs of finished runs: opened again to change their tags, summary or artifacts."""

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from finetune.console import summary_line
from finetune.files.atomic import read_json, write_json
from finetune.files.run_folder import RunFolder
from finetune.tracking.text_privacy import hide_text, shows_text
from finetune.tracking.tracker import final_summary
from finetune.tracking.wandb_arguments import (
    OFFLINE_MODES,
    TRACKER,
    directory,
    quiet_settings,
)

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)


@contextlib.contextmanager
def reopen_run(
    folder: RunFolder, arguments: dict[str, Any], uploads: bool = False
) -> "Iterator[wandb.Run]":
    """Open the W&B run of a completed run again.

    Offline this writes another file for `wandb sync`. The server replaces the config, tags and
    summary of earlier files by those of a later one, so all of them are written again. Online the
    server keeps them.

    Args:
        folder: The run's folder.
        arguments: The content of its `tracker.json`.
        uploads: Whether artifacts are added.

    Raises:
        Exception: Whatever W&B raises.
    """
    import wandb

    # The folder may have been moved since.
    arguments = {**arguments, "dir": directory(folder)}
    summary = arguments.pop("summary", {})
    config = arguments.pop("config", None) or read_json(folder.identity)["config"]
    may_show_text = shows_text(config)
    is_offline = arguments["mode"] in OFFLINE_MODES
    if is_offline:
        arguments["config"] = hide_text(config)
        # Otherwise this file's history replaces the one sent before.
        arguments["resume"] = "allow"
    settings = quiet_settings(arguments["mode"], uploads, may_show_text)
    run = wandb.init(settings=settings, **arguments)
    try:
        if is_offline:
            result = read_json(folder.result)
            final = final_summary(result, may_show_text)
            run.summary.update({**summary, "status": result["status"], **final})
        yield run
    finally:
        # The run did complete, whatever happens to what is added to it.
        run.finish(exit_code=0)


def add_tag(folder: RunFolder, tag: str) -> None:
    """Add a tag to the W&B run of a finished run, if it has one. A failure is a warning."""
    arguments = _arguments(folder)
    if arguments is not None and tag not in _tags(arguments):
        _write_tags(folder, arguments, [*_tags(arguments), tag])


def remove_tag(folder: RunFolder, tag: str) -> None:
    """Remove a tag from the W&B run of a finished run, if it has one. A failure is a warning."""
    arguments = _arguments(folder)
    if arguments is not None and tag in _tags(arguments):
        remaining_tags = [name for name in _tags(arguments) if name != tag]
        _write_tags(folder, arguments, remaining_tags)


def _arguments(folder: RunFolder) -> dict[str, Any] | None:
    """The content of `tracker.json`, None if the run has no W&B run."""
    arguments: dict[str, Any] | None = read_json(folder.path / TRACKER)
    if arguments is None or arguments["mode"] == "disabled":
        return None
    return arguments


def _tags(arguments: dict[str, Any]) -> list[str]:
    return arguments["tags"] or []


def _write_tags(folder: RunFolder, arguments: dict[str, Any], tags: list[str]) -> None:
    arguments = {**arguments, "tags": tags}
    try:
        # The tags are an argument of `wandb.init`: opening the run writes them.
        with reopen_run(folder, arguments):
            pass
    except Exception as error:
        reason = summary_line(error)
        log.warning("W&B: %s; the tags of %s are not %s", reason, folder.path, tags)
    else:
        write_json(folder.path / TRACKER, arguments)
