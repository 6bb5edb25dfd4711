"""The arguments of `wandb.init`, and `tracker.json` in a run's folder, which records them."""

import functools
import logging
import netrc
import os
import urllib.parse
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config.schema import RunConfig
from finetune.config.sections.tracker import TrackerSettings
from finetune.errors import refusal
from finetune.files.atomic import read_json
from finetune.files.run_folder import RunFolder
from finetune.tracking.text_privacy import tracked_config
from finetune.tracking.tracker import Label

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

TRACKER = "tracker.json"
"""Holds the arguments of `wandb.init` with which a run's W&B run was opened, among them `config`.

Besides, `place` is the folder that holds W&B's files, as a path from the run's folder, so that both
may be moved together, and `best` the directions of its metrics.
"""

OFFLINE_MODES = ("offline", "dryrun")
"""Modes in which W&B writes files for `wandb sync`; `dryrun` is an old name."""

FALLBACK = "-offline"
"""Ends the id under which a run is opened offline after its server has not opened it.

For as long as its process lives, W&B holds the id of the failed attempt as in use.
"""

NAME_LENGTH = 128
"""Characters of a project's or an artifact's name that W&B takes."""

INIT_TIMEOUT = 20
"""Seconds to wait for W&B's server when a run starts."""

REQUEST_RETRIES = 2
"""How often a request that the server has not answered in `INIT_TIMEOUT` is repeated."""

FINISH_TIMEOUT = 60
"""Seconds to wait for the last upload when a run ends."""

UPLOAD_TIMEOUT = 600
"""Seconds to wait for the last upload when a run ends and artifacts are uploaded."""


def init_arguments(
    config: RunConfig, folder: RunFolder, label: Label
) -> dict[str, Any]:
    """Return the arguments of `wandb.init` for a run, all but `settings`.

    Args:
        config: The run's config.
        folder: The run's folder. A run that is resumed in it keeps its W&B id.
        label: The run's names in its study; where these are None, W&B's environment variables and
            the config's name are used.
    """
    settings = config.tracker
    mode = _mode(settings)
    return {
        "mode": mode,
        "project": settings.project or os.environ.get("WANDB_PROJECT") or "finetune",
        "entity": settings.entity,
        "name": label.name or os.environ.get("WANDB_NAME") or config.name,
        "group": label.group or os.environ.get("WANDB_RUN_GROUP"),
        "tags": _tags(settings) or None,
        "id": label.id or _run_id(folder, belongs_to_study=label.group is not None),
        "resume": _resume(folder),
        "dir": str(directory(folder, label)),
        "job_type": label.job_type or os.environ.get("WANDB_JOB_TYPE") or "run",
        # Else W&B has one run for a process; here trials that train together have one each.
        "reinit": "create_new",
        "config": tracked_config(config),
    }


def quiet_settings(mode: str, uploads: bool, shows_text: bool) -> "wandb.Settings":
    """Return settings under which W&B prints nothing and waits for a limited time.

    Args:
        mode: The argument `mode` of `wandb.init`.
        uploads: Whether artifacts are uploaded, which takes longer.
        shows_text: Whether W&B may record the command line, which can hold prompts, and the
            changes of a git repository, which can hold rows.
    """
    import wandb

    hiding = {} if shows_text else {"x_disable_meta": True, "disable_git": True}
    return wandb.Settings(
        console="off",
        silent=True,
        init_timeout=INIT_TIMEOUT,
        finish_timeout=UPLOAD_TIMEOUT if uploads else FINISH_TIMEOUT,
        finish_timeout_raises=mode == "online",
        # Otherwise a process can't end while its server takes an artifact and never answers.
        x_graphql_timeout_seconds=INIT_TIMEOUT,
        x_graphql_retry_max=REQUEST_RETRIES,
        x_disable_stats=mode != "online",
        # Seconds that `wandb leet` is behind, and that a kill may take from the file.
        x_transaction_log_flush_interval=1.0,
        # Links to the latest run: all runs of a study stand in one folder.
        symlink=False,
        **hiding,
    )


def require_project(key: str, project: str) -> None:
    """Raise ConfigError where W&B can't have a project of a name.

    Args:
        key: The config key or the environment variable that names it, for the error.
        project: The name.
    """
    is_allowed = len(project) <= NAME_LENGTH and not set("/\\#?%:\r\n") & set(project)
    if not is_allowed:
        allowed = (
            f"W&B takes {NAME_LENGTH} characters, without / \\ # ? % : and line breaks"
        )
        raise refusal(key, project, allowed)


def directory(folder: RunFolder, label: Label) -> Path:
    """Return the folder in which W&B creates `wandb/`: WANDB_DIR, the study's, or the run's."""
    given = os.environ.get("WANDB_DIR") or label.folder or folder.path
    return Path(given).expanduser().absolute()


def recorded_directory(folder: RunFolder, arguments: dict[str, Any]) -> Path:
    """Return the folder in which W&B has created `wandb/` for a run.

    Args:
        folder: The run's folder; it may have been moved since.
        arguments: The content of its `tracker.json`.
    """
    # Before there was `place`, it was the run's folder.
    return Path(os.path.normpath(folder.path / arguments.get("place", ".")))


def without_fallback(run_id: str) -> str:
    """Return the run's id, of that with which it was opened while its server was away."""
    return run_id.removesuffix(FALLBACK)


def _resume(folder: RunFolder) -> str | None:
    """The argument `resume`: a run that has a checkpoint continues, another one begins anew."""
    return "allow" if folder.last_checkpoint() else None


def _mode(settings: TrackerSettings) -> str:
    """The mode of `wandb.init`: online only with a key, so that W&B never asks for it."""
    mode = _wanted_mode(settings)
    if mode != "online" or has_key():
        return mode
    _warn_without_key()
    return "offline"


@functools.cache
def _warn_without_key() -> None:
    """Say once in a process, not in each trial of a study, that there is no key."""
    log.warning(
        "W&B: online needs a key (WANDB_API_KEY, or wandb login); runs are kept offline"
    )


def _wanted_mode(settings: TrackerSettings) -> str:
    """The mode of the config or of the environment; `auto` is online with a key."""
    if settings.mode != "auto":
        return settings.mode
    if is_disabled():
        return "disabled"
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    return "online" if has_key() else "offline"


def is_disabled() -> bool:
    """Whether WANDB_DISABLED is set, which W&B itself no longer reads."""
    value = os.environ.get("WANDB_DISABLED", "").lower()
    return value not in ("", "0", "false", "no", "off")


def _tags(settings: TrackerSettings) -> list[str]:
    """The tags of the config, after those of WANDB_TAGS: W&B reads these only without others."""
    tags = os.environ.get("WANDB_TAGS", "").split(",")
    given_tags = [tag.strip() for tag in tags if tag.strip()]
    distinct_tags = dict.fromkeys([*given_tags, *settings.tags])
    return list(distinct_tags)


def has_key() -> bool:
    """Whether a key is in the environment, or in the netrc file, where `wandb login` writes it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    address = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    # W&B asks the netrc file by the server's host.
    host = str(urllib.parse.urlparse(address).hostname)
    try:
        logins = netrc.netrc(os.environ.get("NETRC"))
        return logins.authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _run_id(folder: RunFolder, belongs_to_study: bool) -> str:
    """The W&B id of the run that is resumed in a folder, else WANDB_RUN_ID, else a new one."""
    arguments = read_json(folder.path / TRACKER)
    if arguments is None:
        # Several runs can't have one id.
        given_id = None if belongs_to_study else os.environ.get("WANDB_RUN_ID")
        return given_id or uuid.uuid4().hex[:12]
    return without_fallback(str(arguments["id"]))
