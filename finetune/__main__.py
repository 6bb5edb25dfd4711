"""Fine-tune one model: `python -m finetune [group=choice] [key=value]`."""

from typing import TYPE_CHECKING

from finetune.cli import hydra_app

if TYPE_CHECKING:
    from omegaconf import DictConfig


def task(composed: "DictConfig") -> float | tuple[float, ...] | None:
    """Check the config, run it in Hydra's folder, and return the objective, which a sweeper reads."""
    from hydra.core.hydra_config import HydraConfig

    from finetune.config import RunConfig, refusal
    from finetune.records import discard_if_untouched
    from finetune.run import run

    folder = HydraConfig.get().runtime.output_dir
    try:
        config = RunConfig.from_hydra(composed)
    except ValueError:
        discard_if_untouched(folder)
        raise
    if config.resume is not None:
        raise refusal("resume", config.resume, "belongs on the command line: python -m finetune resume=FOLDER")
    return run(config, folder)


def main() -> None:
    """The console script `finetune`."""
    hydra_app(task)


if __name__ == "__main__":
    main()
