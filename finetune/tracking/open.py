"""Open the trackers that the config names."""

import importlib.util
from collections.abc import Callable

from finetune.config.schema import RunConfig
from finetune.config.sections.tracker import TrackerSettings
from finetune.errors import refusal
from finetune.files.run_folder import RunFolder
from finetune.tracking.mlflow import MlflowTracker
from finetune.tracking.tensorboard import TensorboardTracker
from finetune.tracking.tracker import Label, SeveralTrackers, Tracker
from finetune.tracking.trackio import TrackioTracker
from finetune.tracking.wandb import WandbTracker
from finetune.tracking.wandb_arguments import require_project

PACKAGES = {"mlflow": "mlflow-skinny", "trackio": "trackio"}
"""Packages of trackers that are extras; modules and extras have the trackers' names."""


def check_trackers(settings: TrackerSettings) -> None:
    """Raise ConfigError where a tracker's package is missing, or it can't have the project."""
    for name in settings.names:
        require_package("tracker.name", name)
    is_wandb = "wandb" in settings.names and settings.mode != "disabled"
    if is_wandb and settings.project:
        require_project("tracker.project", settings.project)


def require_package(key: str, name: str) -> None:
    """Raise ConfigError where the package of a tracker is not installed.

    Args:
        key: The config key or the flag that names the tracker, for the error.
        name: The tracker.
    """
    if name in PACKAGES and importlib.util.find_spec(name) is None:
        command = f'pip install "qlora-sweeps[{name}]"'
        raise refusal(key, name, f"needs the package {PACKAGES[name]}: {command}")


def open_tracker(config: RunConfig, folder: RunFolder, label: Label) -> Tracker:
    """Open the trackers of `tracker.name`; one that can't be opened is left out with a warning."""
    settings = config.tracker
    openers: list[Callable[[], Tracker]] = []
    for name in settings.names:
        if name == "wandb" and settings.mode != "disabled":
            openers.append(lambda: WandbTracker(config, folder, label))
        elif name == "tensorboard":
            openers.append(lambda: TensorboardTracker(config, folder))
        elif name == "mlflow":
            openers.append(lambda: MlflowTracker(config, folder, label))
        elif name == "trackio":
            openers.append(lambda: TrackioTracker(config, folder, label))
    return SeveralTrackers(openers, shows_text=settings.text)
