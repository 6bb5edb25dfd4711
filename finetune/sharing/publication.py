"""Publish a run on the hub: its adapter, its tokenizer, a model card, and the base's licence."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune.console import error_line
from finetune.files.run_folder import RunFolder
from finetune.run.load import read_run_config, read_trained_config
from finetune.sharing.model_card import make_model_card
from finetune.sharing.upload import (
    Uploaded,
    create_repository,
    require_uploads,
    upload_files,
)

log = logging.getLogger(__name__)

CARD = "README.md"
"""A model card's name on the hub, and that of PEFT's empty one in the adapter's folder."""


@dataclass(frozen=True)
class Target:
    """Where a run is published, and how much of it."""

    key: str
    """The flag or the config key that names the repository, for errors."""
    name: str
    """`owner/name`, or `name` for a repository of the token's owner."""
    private: bool
    """Whether a new repository is private."""
    samples: bool
    """Whether the card shows sample prompts and answers."""


@dataclass(frozen=True)
class Extra:
    """What a publication has beside the run's."""

    sections: Sequence[str] = ()
    """Sections of the card in Markdown."""
    tags: Sequence[str] = ()
    files: Mapping[str, Path | bytes] = field(default_factory=dict)
    """By their names in the repository."""


NOTHING = Extra()


def find_target(
    folder: Path,
    name: str | None = None,
    private: bool | None = None,
    samples: bool | None = None,
    default_name: str | None = None,
) -> Target:
    """Return where a run is published: as the arguments say, else as its config does.

    Args:
        folder: The run folder.
        name: The repository; None: `hub.model_id`, or `default_name`, or the run's name.
        private: Whether a new repository is private; None: `hub.private`.
        samples: Whether the card shows samples; None: `hub.samples`.
        default_name: A name for want of others.

    Raises:
        ConfigError: The folder holds no run, or the upload can't succeed.
    """
    config = read_run_config(folder)
    hub = config.hub
    # An empty name is refused, and stands for no other: it may be a variable that was not set.
    key = "hub.model_id" if name is None else "--to"
    if name is None:
        name = hub.model_id or default_name or config.name
    target = Target(
        key=key,
        name=name,
        private=hub.private if private is None else private,
        samples=hub.samples if samples is None else samples,
    )
    require_uploads(target.key, target.name)
    return target


def publish_run(
    folder: Path, target: Target, extra: Extra = NOTHING, branch: str = "main"
) -> Uploaded:
    """Publish a run that has an adapter. Published again, it is updated.

    Args:
        folder: The run folder.
        target: Where.
        extra: What is published beside it.
        branch: The repository's branch.

    Raises:
        ConfigError: The run has no adapter, or the hub refuses, or can't be reached.
    """
    config = read_trained_config(folder)
    run = RunFolder(folder)
    repository = create_repository(target.key, target.name, target.private)
    card = make_model_card(run, repository, target.samples, extra.sections, extra.tags)
    files: dict[str, Path | bytes] = {CARD: card.text.encode()}
    files |= card.base.license_files
    for path in sorted(run.adapter.iterdir()):
        if path.is_file() and path.name != CARD:
            files[path.name] = path
    files |= extra.files
    message = f"Adapter of {config.name}"
    return upload_files(target.key, repository, files, message, branch)


def published_value(uploaded: Uploaded, target: Target) -> dict[str, Any]:
    """Return a publication as `--json` prints it."""
    return {**asdict(uploaded), "samples": target.samples}


def describe_published(uploaded: Uploaded) -> str:
    """Return the line that a command prints."""
    if not uploaded.changed:
        return f"{uploaded.url} has the same files already"
    return f"published: {uploaded.url} (commit {uploaded.commit[:12]})"


def push_if_wanted(
    folder: Path,
    make_extra: Callable[[], Extra] = Extra,
    default_name: str | None = None,
) -> str | None:
    """Publish a run if its config says so (`hub.push`); a failure is one warning.

    Args:
        folder: The run folder.
        make_extra: Returns what is published beside it.
        default_name: The repository where `hub.model_id` is null; None: the run's name.

    Returns:
        The line that says where; None: it was not published.
    """
    if not read_run_config(folder).hub.push:
        return None
    try:
        target = find_target(folder, default_name=default_name)
        return describe_published(publish_run(folder, target, make_extra()))
    # Training took hours: whatever the hub does must not fail the run.
    except Exception as error:
        reason = error_line(error)
        log.warning("hub.push=true: not published (%s)", reason)
        return None
