"""Shell commands that use a study's winner or show its trials."""

import os
import re
import shlex
from pathlib import Path

from finetune.config.secrets import STORAGE_KEY, refuse_secrets_in
from finetune.errors import ConfigError
from finetune.files.atomic import read_json
from sweeps.answer.serving import serving_commands
from sweeps.study.storage import JOURNAL
from sweeps.study.study import Study


def commands(study: Study) -> list[tuple[str, str]]:
    """List shell commands that use a study's winner or show its trials.

    Args:
        study: the study.

    Returns:
        Pairs of a short purpose and a command, for the current working directory.
    """
    folder = shlex.quote(os.path.relpath(study.folder))
    pairs = [
        ("generate", f'python -m finetune.generate {folder}/best --prompt "…"'),
        ("train again", f"python -m finetune --config-dir {folder} experiment=best"),
    ]
    if len(study.objectives) == 1:
        pairs.append(
            ("confirm", f"python -m sweeps confirm {folder} --top 3 --seeds 5")
        )
    pairs += serving_commands(study)
    pairs += [
        ("publish", f"python -m sweeps publish {folder} --to YOU/{study.name}"),
        ("dashboard", f"optuna-dashboard {_shell_storage(study)}"),
    ]
    sync_command = _sync_command(study)
    if sync_command is not None:
        pairs.append(("W&B", sync_command))
    return pairs


def _sync_command(study: Study) -> str | None:
    """Return the command that sends to W&B what is on this machine only; None if there is none."""
    shared = os.environ.get("WANDB_DIR")
    if shared:
        # It holds the files of other studies too. Without quotes, because the shell expands it.
        pattern = f"wandb/offline-run-*-{study.uid}-*"
        if _has_unsent(Path(shared), pattern):
            return f"wandb sync {shlex.quote(os.path.relpath(shared))}/{pattern}"
        return None
    paths = []
    if _has_unsent(study.folder, "wandb/offline-run-*"):
        paths.append(shlex.quote(os.path.relpath(study.folder / "wandb")))
    # Of a study that an earlier version began.
    pattern = "*/*/wandb/offline-run-*"
    if _has_unsent(study.folder, pattern):
        paths.append(f"{shlex.quote(os.path.relpath(study.folder))}/{pattern}")
    return f"wandb sync {' '.join(paths)}" if paths else None


def _has_unsent(folder: Path, pattern: str) -> bool:
    """Whether there is an offline run that `wandb sync` has not marked as sent."""
    files = folder.glob(f"{pattern}/run-*.wandb")
    return any(not Path(f"{file}.synced").exists() for file in files)


def _shell_storage(study: Study) -> str:
    """Format the study's storage as a shell word; secrets stay environment variables."""
    address = written_address(study)
    if address is None:
        return shlex.quote(os.path.relpath(study.folder / JOURNAL))
    # ${oc.env:NAME} of OmegaConf, perhaps with a default, is $NAME in a shell.
    with_shell_variables = re.sub(r"\$\{oc\.env:(\w+)[^}]*\}", r"$\1", address)
    # In double quotes, within which a shell still replaces variables.
    return f'"{with_shell_variables}"'


def written_address(study: Study) -> str | None:
    """Return the database's address as the user wrote it, without secrets; None: the journal."""
    address: str | None = read_json(study.folder / "study.json")["storage"]
    if address is None:
        return None
    try:
        refuse_secrets_in(f"{STORAGE_KEY}={address}")
    # An earlier version accepted a password in the address.
    except ConfigError:
        return "${oc.env:STUDY_DATABASE}"
    return address
