"""A run as a Hydra job: the config is checked, and the run is made in Hydra's folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.types import RunMode

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from finetune.config.schema import RunConfig
    from finetune.engine.steps import RunSteps
    from finetune.run.result import Objective


def checked(composed: "DictConfig") -> "RunConfig":
    """A job's config. Raises ConfigError for what no run takes, before anything heavy is imported."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from finetune.config.schema import RunConfig
    from finetune.config.secrets import refuse_secrets_in
    from finetune.errors import ConfigError, refusal

    sweeper = OmegaConf.to_container(HydraConfig.get().sweeper, resolve=False)
    storage = sweeper.get("storage") if isinstance(sweeper, dict) else None
    refuse_secrets_in(f"hydra.sweeper.storage={storage}")  # from a file: one run writes its whole Hydra config
    for override in HydraConfig.get().overrides.task:
        if override.startswith("search"):
            raise ConfigError(
                f"{override}: only the Optuna sweeper searches: python -m finetune -m hydra/sweeper=optuna"
            )
    config = RunConfig.from_hydra(composed)
    if config.resume is not None:
        raise refusal("resume", config.resume, "belongs on the command line: python -m finetune resume=FOLDER")
    return config


def job(composed: "DictConfig", **beside: Any) -> "RunSteps[Objective]":
    """Check the config, and return its run in Hydra's folder, as work that takes turns with others beside it."""
    from hydra.core.hydra_config import HydraConfig

    from finetune.files.run_folder import RunFolder, discard_if_untouched

    hydra = HydraConfig.get()
    folder = hydra.runtime.output_dir
    try:
        config = checked(composed)
    except ValueError:
        discard_if_untouched(folder)
        raise
    from finetune.run.context import RunContext
    from finetune.run.resources import shared_resources
    from finetune.run.run import run_steps
    from finetune.tracking.tracker import Label

    label = Label()
    if hydra.mode == RunMode.MULTIRUN:
        group = Path(hydra.sweep.dir).name
        label = Label(name=f"{config.name}-{hydra.job.num}", group=group, job_type="trial")
    return run_steps(config, RunFolder(folder), RunContext(resources=shared_resources, label=label, **beside))
