"""Where metrics and adapters are shown and uploaded."""

from dataclasses import dataclass
from typing import Literal

from finetune.config.sections.section import Section
from finetune.errors import refusal


@dataclass(frozen=True, kw_only=True)
class TrackerSettings(Section):
    """Where metrics are shown."""

    section = "tracker"

    name: Literal["wandb", "tensorboard", "both", "none"]
    """The tracker. Metrics are written to the run folder in any case."""

    project: str | None
    """W&B project; null: WANDB_PROJECT in the environment, or finetune."""

    entity: str | None
    """W&B user or team; null: the account's default."""

    mode: Literal["auto", "online", "offline", "disabled"]
    """W&B mode; auto: online with a key, else offline."""

    tags: list[str]
    """Tags of the W&B run."""

    adapters: Literal["none", "best", "all"] = "none"
    """Which adapters are uploaded to W&B; best: that of a single run, or of a study's winner."""

    workspace: bool = False
    """Whether a W&B view of a study is saved when the study ends; only online."""

    text: bool = True
    """Whether trackers get prompts, answers and rows: samples, prompts and templates in the config,
    messages of errors, the command line, a study's report. false: they stay in local files."""
    # These defaults are for run folders that were written before the keys existed.

    def __post_init__(self) -> None:
        allowed = "each tag must have 1 to 64 characters, the limit of W&B"
        for tag in self.tags:
            if not 1 <= len(tag) <= 64:
                raise refusal("tracker.tags", tag, allowed)


@dataclass(frozen=True, kw_only=True)
class HubSettings(Section):
    """Upload of the adapter to the Hugging Face hub."""

    section = "hub"

    push: bool
    """Whether the adapter is uploaded when the run has completed."""

    model_id: str | None
    """Repository on the hub; null: the run's name."""

    private: bool
    """Whether a new repository is private."""
