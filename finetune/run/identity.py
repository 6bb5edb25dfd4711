"""What makes a run this run and no other, so that no other one resumes in its folder."""

from typing import Any

from finetune.config.flatten import flatten
from finetune.config.schema import RunConfig
from finetune.data.types import Rows
from finetune.errors import refusal
from finetune.files.atomic import read_json
from finetune.files.run_folder import RunFolder
from finetune.model.source import BaseSource


def run_identity(config: RunConfig, rows: Rows | None, base: BaseSource | None) -> dict[str, Any]:
    """What makes a run this run and no other; kept in its folder as `run.json`."""
    return {
        "config": config.anchored().to_dict(),
        "dataset_fingerprint": rows.fingerprint if rows else None,
        "base_model": base.identity if base else None,
    }


KEYS_WITHOUT_EFFECT = ("name", "resume", "tracker.", "hub.", "sample_", "model.learning_rate")
"""Keys that may change while a run, or a study, goes on: they change no number.

A base's rate acts through `optimizer.learning_rate`, which is a number before it is compared.
"""


def require_same_run(folder: RunFolder, identity: dict[str, Any]) -> None:
    """Refuse to go on with another run than the one that began in the folder. Where its metrics go may change."""
    known = read_json(folder.identity)
    if known is None:
        return
    then, now = flatten(known), flatten(identity)
    for key, value in now.items():
        free = key.removeprefix("config.").startswith(KEYS_WITHOUT_EFFECT)
        if not free and value != then.get(key) and (value is not None or key.startswith("config.")):
            allowed = f"the run that began in {folder.path} has {then.get(key)}; give another hydra.run.dir or name"
            raise refusal(key.removeprefix("config."), value, allowed)
