"""Fine-tune one model: `python -m finetune [group=choice] [key=value]`."""

from typing import TYPE_CHECKING

from finetune.app import hydra_app
from finetune.run.job import job

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from finetune.run.result import Objective


def task(composed: "DictConfig") -> "Objective":
    """Run the config to its end, and return the objective, which a sweeper reads."""
    from finetune.engine.steps import drive

    return drive(job(composed))


def resume(folder: str) -> "Objective":
    """Go on with the run in a folder from its last checkpoint."""
    from finetune.run.run import resume as resume_run

    return resume_run(folder)


def main() -> None:
    """The console script `finetune`."""
    hydra_app(task, resume)


if __name__ == "__main__":
    main()
