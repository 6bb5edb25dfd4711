"""Open the trackers that the config names."""

from collections.abc import Callable

from finetune.config.schema import RunConfig
from finetune.files.run_folder import RunFolder
from finetune.tracking.tensorboard import TensorboardTracker
from finetune.tracking.tracker import Label, SeveralTrackers, Tracker
from finetune.tracking.wandb import WandbTracker


def open_tracker(config: RunConfig, folder: RunFolder, label: Label) -> Tracker:
    """Open the trackers of `tracker.name`; one that can't be opened is left out with a warning."""
    settings = config.tracker
    openers: list[Callable[[], Tracker]] = []
    if settings.name in ("wandb", "both") and settings.mode != "disabled":
        openers.append(lambda: WandbTracker(config, folder, label))
    if settings.name in ("tensorboard", "both"):
        openers.append(lambda: TensorboardTracker(config, folder))
    return SeveralTrackers(openers, shows_text=settings.text)
