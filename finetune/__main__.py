"""Fine-tune one model: `python -m finetune [group=choice] [key=value]`."""

from pathlib import Path
from typing import TYPE_CHECKING

from hydra.types import RunMode

from finetune.cli import hydra_app

if TYPE_CHECKING:
    from omegaconf import DictConfig


def task(composed: "DictConfig") -> float | tuple[float, ...] | None:
    """Check the config, run it in Hydra's folder, and return the objective, which a sweeper reads."""
    from hydra.core.hydra_config import HydraConfig

    from finetune.config import ConfigError, RunConfig, refusal
    from finetune.records import discard_if_untouched
    from finetune.run import Part, run
    from finetune.supplies import SHARED
    from finetune.trackers import Label

    hydra = HydraConfig.get()
    folder = hydra.runtime.output_dir
    try:
        for override in hydra.overrides.task:
            if override.startswith("search"):
                raise ConfigError(
                    f"{override}: only the Optuna sweeper searches: python -m finetune -m hydra/sweeper=optuna"
                )
        config = RunConfig.from_hydra(composed)
    except ValueError:
        discard_if_untouched(folder)
        raise
    if config.resume is not None:
        raise refusal("resume", config.resume, "belongs on the command line: python -m finetune resume=FOLDER")
    label = Label()
    if hydra.mode == RunMode.MULTIRUN:
        group = Path(hydra.sweep.dir).name
        label = Label(name=f"{config.name}-{hydra.job.num}", group=group, job_type="trial")
    return run(config, folder, Part(supplies=SHARED, label=label))


def main() -> None:
    """The console script `finetune`."""
    hydra_app(task)


if __name__ == "__main__":
    main()
