"""Files and folders as artifacts of a W&B run."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.tracking.wandb_arguments import NAME_LENGTH

if TYPE_CHECKING:
    import wandb


def log_artifact(
    run: "wandb.Run",
    name: str,
    kind: str,
    path: Path,
    aliases: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
) -> "wandb.Artifact":
    """Add a file, or all files of a folder, to a W&B run as an artifact.

    W&B copies the files before this returns: a study removes most adapters, perhaps before
    `wandb sync` uploads them.

    Args:
        run: The open W&B run.
        name: The artifact's name; characters that W&B does not allow become `-`.
        kind: The artifact's type, as `model`.
        path: A file or a folder.
        aliases: Further aliases, next to `latest`.
        metadata: What W&B shows of the artifact.

    Returns:
        The artifact; its `wait` ends when the server has it.
    """
    import wandb

    given = dict(metadata) if metadata else None
    artifact = wandb.Artifact(artifact_name(name), type=kind, metadata=given)
    root = path.parent if path.is_file() else path
    for file in files_of(path):
        relative_path = file.relative_to(root)
        artifact.add_file(str(file), name=str(relative_path))
    logged: wandb.Artifact = run.log_artifact(artifact, aliases=["latest", *aliases])
    return logged


def artifact_name(name: str) -> str:
    """Return a name as W&B allows it: letters of ASCII, digits, `-`, `_` and `.`.

    A name that is too long is cut, and ends in a part of its SHA-256.
    """
    shown = re.sub(r"(?a)[^\w.-]", "-", name)
    if len(shown) <= NAME_LENGTH:
        return shown
    end = f"-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return f"{shown[: NAME_LENGTH - len(end)]}{end}"


def files_of(path: Path) -> list[Path]:
    """Return the files of an artifact in order: a file itself, or all files below a folder."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file())
