"""The identity of a run, so that no other run resumes in its folder."""

from typing import Any

from finetune.config.flatten import flatten
from finetune.config.schema import RunConfig
from finetune.data.rows import Rows
from finetune.errors import refusal
from finetune.files.atomic import read_json
from finetune.files.run_folder import RunFolder
from finetune.model.source import BaseSource

KEYS_WITHOUT_EFFECT = (
    "name",
    "resume",
    "tracker.",
    "hub.",
    "mirror",
    "notify.",
    "sample_",
    "model.learning_rate",
    "evaluation.concurrency",
    "evaluation.retries",
    "trainer.gpus",
    "trainer.save_minutes",
)
"""Beginnings of the keys that may change when a run or a study is resumed: they change no number.

`model.learning_rate` acts through `optimizer.learning_rate`, which is a number when it is compared.
"""


def run_identity(
    config: RunConfig, rows: Rows | None, base: BaseSource | None
) -> dict[str, Any]:
    """Return the content of `run.json`: the config, and hashes of the rows and of the base.

    Args:
        config: The run's config.
        rows: Its rows; None where they have not been read yet.
        base: Its base; None where it has not been looked for yet.
    """
    return {
        "config": config.with_absolute_paths().to_dict(),
        "dataset_fingerprint": rows.fingerprint if rows else None,
        "base_model": base.identity if base else None,
    }


def require_same_run(folder: RunFolder, identity: dict[str, Any]) -> None:
    """Raise ConfigError if another run began in the folder. Unknown hashes are not compared."""
    recorded = read_json(folder.identity)
    if recorded is None:
        return
    # A record from before a key existed has the key's default.
    config = RunConfig.from_dict(recorded["config"])
    recorded_values = flatten({**recorded, "config": config.to_dict()})
    # Key by key, so that the refusal can name the one that differs.
    for path, value in flatten(identity).items():
        key = path.removeprefix("config.")
        is_unknown_hash = value is None and not path.startswith("config.")
        if key.startswith(KEYS_WITHOUT_EFFECT) or is_unknown_hash:
            continue
        recorded_value = recorded_values.get(path)
        if value != recorded_value:
            began = f"the run that began in {folder.path} has {recorded_value}"
            raise refusal(key, value, f"{began}; give another hydra.run.dir or name")
