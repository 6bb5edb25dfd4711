"""Tags of finished runs, in all trackers that have tags."""

import logging

from finetune.files.run_folder import RunFolder
from finetune.tracking import mlflow, wandb_finished
from finetune.tracking.tracker import reason

log = logging.getLogger(__name__)


def add_tag(folder: RunFolder, tag: str) -> None:
    """Add a tag to a finished run's runs in trackers. A failure is a warning."""
    wandb_finished.add_tag(folder, tag)
    _change_mlflow_tag(folder, tag, is_set=True)


def remove_tag(folder: RunFolder, tag: str) -> None:
    """Remove a tag from a finished run's runs in trackers. A failure is a warning."""
    wandb_finished.remove_tag(folder, tag)
    _change_mlflow_tag(folder, tag, is_set=False)


def _change_mlflow_tag(folder: RunFolder, tag: str, is_set: bool) -> None:
    try:
        mlflow.change_tag(folder, tag, is_set)
    except Exception as error:
        cause = reason(error)
        log.warning(
            "MLflow: %s; the tag %s of %s is unchanged", cause, tag, folder.path
        )
