"""Where metrics and adapters are shown and uploaded."""

from dataclasses import dataclass
from typing import Literal

from finetune.config.sections.section import Section
from finetune.errors import refusal

TrackerName = Literal["wandb", "tensorboard", "mlflow", "trackio", "both", "none"]


@dataclass(frozen=True, kw_only=True)
class TrackerSettings(Section):
    """Where metrics are shown."""

    section = "tracker"

    name: TrackerName | list[TrackerName]
    """The tracker, or a list of several; both: wandb and tensorboard. Metrics are written to the
    run folder in any case."""

    project: str | None
    """Project of W&B and Trackio, experiment of MLflow; null: WANDB_PROJECT (W&B) or
    MLFLOW_EXPERIMENT_NAME (MLflow) in the environment, or finetune."""

    entity: str | None
    """W&B user or team; null: the account's default."""

    mode: Literal["auto", "online", "offline", "disabled"]
    """W&B mode; auto: online with a key, else offline."""

    tags: list[str]
    """Tags of the run in W&B and MLflow."""

    adapters: Literal["none", "best", "all"] = "none"
    """Which adapters W&B, MLflow and Trackio store; best: that of a single run, or, in W&B, of a
    study's winner."""

    workspace: bool = False
    """Whether a W&B view of a study is saved when the study ends; only online."""

    text: bool = True
    """Whether trackers get prompts, answers and rows: samples, prompts and templates in the config,
    messages of errors, the command line, a study's report. false: they stay in local files."""
    # These defaults are for run folders that were written before the keys existed.

    @property
    def names(self) -> list[str]:
        """Return each tracker once, without `both` and `none`."""
        given = self.name if isinstance(self.name, list) else [self.name]
        names: list[str] = []
        for name in given:
            names += ["wandb", "tensorboard"] if name == "both" else [name]
        return [name for name in dict.fromkeys(names) if name != "none"]

    def __post_init__(self) -> None:
        allowed = "each tag must have 1 to 64 characters, the limit of W&B"
        for tag in self.tags:
            if not 1 <= len(tag) <= 64:
                raise refusal("tracker.tags", tag, allowed)


@dataclass(frozen=True, kw_only=True)
class HubSettings(Section):
    """Upload of the adapter to the Hugging Face hub, with a model card."""

    section = "hub"

    push: bool
    """Whether the adapter is uploaded when the run has completed; of a study, that of its
    winner."""

    model_id: str | None
    """Repository on the hub, as `owner/name`; null: the run's name, of a study the study's."""

    private: bool
    """Whether a new repository is private."""

    samples: bool = False
    """Whether the model card shows sample prompts, answers and rows."""
    # The default is for run folders that were written before the key existed.
