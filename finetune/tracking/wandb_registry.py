"""W&B as a registry: an adapter as a version of an artifact of its project, with an alias."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from finetune.errors import ConfigError, refusal
from finetune.tracking.registry import DIGEST, Lineage, Registry, Version
from finetune.tracking.tracker import reason
from finetune.tracking.wandb_arguments import (
    NAME_LENGTH,
    OFFLINE_MODES,
    UPLOAD_TIMEOUT,
    has_key,
    is_disabled,
    quiet_settings,
    require_project,
)
from finetune.tracking.wandb_artifacts import artifact_name, log_artifact

if TYPE_CHECKING:
    import wandb

KIND = "model"

T = TypeVar("T")


class WandbRegistry(Registry):
    """An artifact of a W&B project.

    Args:
        key: The flag or the config key that names the artifact, for errors.
        name: The artifact; characters that W&B does not allow become `-`.
        project: The project; None: WANDB_PROJECT, or `finetune`.
        entity: The user or team; None: the account's default.
        shows_text: Whether W&B may record the command line.

    Raises:
        ConfigError: W&B is offline, as a registration needs its server; or it can't have an
            artifact or a project of that name.
    """

    title = "W&B"

    def __init__(
        self,
        key: str,
        name: str,
        project: str | None,
        entity: str | None,
        shows_text: bool,
    ) -> None:
        if len(name) > NAME_LENGTH:
            allowed = f"an artifact of W&B has {NAME_LENGTH} characters at most"
            raise refusal(key, name, allowed)
        mode = os.environ.get("WANDB_MODE") or "online"
        if is_disabled() or mode in (*OFFLINE_MODES, "disabled"):
            allowed = "W&B is offline (WANDB_MODE), and registering needs its server"
            raise refusal("--to", "wandb", allowed)
        if not has_key():
            allowed = "registering needs a key (WANDB_API_KEY, or wandb login)"
            raise refusal("--to", "wandb", allowed)
        # Else its library says on the terminal where it has found the key.
        os.environ.setdefault("WANDB_SILENT", "true")
        self._name = artifact_name(name)
        project_key = "tracker.project" if project else "WANDB_PROJECT"
        self._project = project or os.environ.get("WANDB_PROJECT") or "finetune"
        require_project(project_key, self._project)
        self._entity = entity
        self._shows_text = shows_text

    def current(self, alias: str) -> Version | None:
        return _ask(lambda: self._current(alias))

    def _current(self, alias: str) -> Version | None:
        import wandb

        api = wandb.Api()
        entity = self._entity or api.default_entity
        path = f"{entity}/{self._project}/{self._name}:{alias}"
        # The library says by the text alone that there is no such thing.
        try:
            artifact = api.artifact(path, type=KIND)
        except (ValueError, wandb.errors.CommError) as error:
            if "not found" in str(error):
                return None
            raise
        return self._version(artifact, f"{entity}/{self._project}")

    def register(self, adapter: Path, lineage: Lineage, alias: str) -> Version:
        return _ask(lambda: self._register(adapter, lineage, alias))

    def _register(self, adapter: Path, lineage: Lineage, alias: str) -> Version:
        import wandb

        with tempfile.TemporaryDirectory() as directory:
            run = wandb.init(
                mode="online",
                project=self._project,
                entity=self._entity,
                name=f"promote {lineage['study']}",
                group=str(lineage["study"]),
                job_type="promote",
                config=dict(lineage),
                dir=directory,
                reinit="create_new",
                settings=quiet_settings("online", True, self._shows_text),
            )
            exit_code = 1
            try:
                artifact = log_artifact(
                    run, self._name, KIND, adapter, [alias], lineage
                )
                artifact.wait(UPLOAD_TIMEOUT)
                exit_code = 0
            finally:
                run.finish(exit_code=exit_code)
            return self._version(artifact, f"{run.entity}/{run.project}")

    def _version(self, artifact: "wandb.Artifact", project: str) -> Version:
        import wandb

        # `artifact.url` would ask the server for more.
        server = wandb.setup().settings.app_url
        folder = f"{server}/{project}/artifacts/{KIND}"
        return Version(
            name=self._name,
            version=str(artifact.version),
            digest=artifact.metadata.get(DIGEST),
            url=f"{folder}/{self._name}/{artifact.version}",
        )


def _ask(ask: Callable[[], T]) -> T:
    try:
        return ask()
    except Exception as error:
        raise ConfigError(f"--to=wandb: {reason(error)}") from None
