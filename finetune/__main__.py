"""Fine-tune one model: `python -m finetune [group=choice] [key=value]`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.types import RunMode

from finetune.cli import hydra_app

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from finetune.config import RunConfig
    from finetune.progress import Turns
    from finetune.run import Objective


def checked(composed: "DictConfig") -> "RunConfig":
    """A job's config. Raises ConfigError for what no run takes, before anything heavy is imported."""
    from hydra.core.hydra_config import HydraConfig

    from finetune.config import ConfigError, RunConfig, refusal

    for override in HydraConfig.get().overrides.task:
        if override.startswith("search"):
            raise ConfigError(
                f"{override}: only the Optuna sweeper searches: python -m finetune -m hydra/sweeper=optuna"
            )
    config = RunConfig.from_hydra(composed)
    if config.resume is not None:
        raise refusal("resume", config.resume, "belongs on the command line: python -m finetune resume=FOLDER")
    return config


def job(composed: "DictConfig", **beside: Any) -> "Turns[Objective]":
    """Check the config, and return its run in Hydra's folder, as work that takes turns with others beside it."""
    from hydra.core.hydra_config import HydraConfig

    from finetune.records import RunFolder, discard_if_untouched

    hydra = HydraConfig.get()
    folder = hydra.runtime.output_dir
    try:
        config = checked(composed)
    except ValueError:
        discard_if_untouched(folder)
        raise
    from finetune.run import Part, take_turns
    from finetune.supplies import SHARED
    from finetune.trackers import Label

    label = Label()
    if hydra.mode == RunMode.MULTIRUN:
        group = Path(hydra.sweep.dir).name
        label = Label(name=f"{config.name}-{hydra.job.num}", group=group, job_type="trial")
    return take_turns(config, RunFolder(folder), Part(supplies=SHARED, label=label, **beside))


def task(composed: "DictConfig") -> "Objective":
    """Run the config to its end, and return the objective, which a sweeper reads."""
    from finetune.progress import alone

    return alone(job(composed))


def main() -> None:
    """The console script `finetune`."""
    hydra_app(task)


if __name__ == "__main__":
    main()
