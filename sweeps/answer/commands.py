"""Shell commands that use a study's winner or show its trials."""

import json
import os
import re
import shlex
from pathlib import Path

from finetune.config.secrets import STORAGE_KEY, refuse_secrets_in
from finetune.errors import ConfigError
from finetune.files.atomic import read_json
from finetune.files.run_folder import RunFolder
from finetune.run.load import read_run_config
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
    merged = shlex.quote(os.path.relpath(study.folder / "merged"))
    pairs = [
        ("generate", f'python -m finetune.generate {folder}/best --prompt "…"'),
        ("train again", f"python -m finetune --config-dir {folder} experiment=best"),
    ]
    if len(study.objectives) == 1:
        pairs.append(
            ("confirm", f"python -m sweeps confirm {folder} --top 3 --seeds 5")
        )
    pairs += [
        ("merge", f"python -m finetune.merge {folder}/best --to {merged}"),
        ("serve", f"vllm serve {merged}{_template_flag(study)}"),
        ("upload", f"hf upload YOU/{study.name} {folder}/best/adapter"),
        ("dashboard", f"optuna-dashboard {_shell_storage(study)}"),
    ]
    offline_runs = _offline_runs(study, folder)
    if offline_runs:
        pairs.append(("W&B", f"wandb sync {' '.join(offline_runs)}"))
    return pairs


def _template_flag(study: Study) -> str:
    """Return vLLM's flag for the variables that the winner's chat template was rendered with.

    Empty where there are none, and for several objectives, which have no one winner.
    """
    best = RunFolder(study.folder / "best")
    if not best.identity.exists():
        return ""
    variables = read_run_config(best.path).model.template_kwargs
    if not variables:
        return ""
    argument = shlex.quote(json.dumps(variables))
    return f" --default-chat-template-kwargs {argument}"


def _offline_runs(study: Study, folder: str) -> list[str]:
    """Return shell patterns of the W&B runs that are stored on this machine only."""
    patterns = []
    shared = os.environ.get("WANDB_DIR")
    if shared:
        # It holds the files of other studies too.
        pattern = f"wandb/offline-run-*-{study.uid}-*"
        if any(Path(shared).glob(pattern)):
            patterns.append(f"{shlex.quote(os.path.relpath(shared))}/{pattern}")
    for runs in ("trials", "confirm", "baseline"):
        pattern = f"{runs}/*/wandb/offline-run-*"
        if any(study.folder.glob(pattern)):
            # Without quotes, because the shell has to expand it.
            patterns.append(f"{folder}/{pattern}")
    return patterns


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
