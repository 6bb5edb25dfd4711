"""Fine-tune one model: `python -m finetune [group=choice] [key=value]`."""

from typing import TYPE_CHECKING

from finetune.app import hydra_app

if TYPE_CHECKING:
    from pathlib import Path

    from omegaconf import DictConfig

    from finetune.run.result import Objective


def task(composed: "DictConfig") -> "Objective":
    """Train the run of a composed config, and return its objective for a sweeper."""
    # Imported late: --help, --cfg and a refused override need nothing of it.
    from finetune.run.job import run_job

    return run_job(composed)


def resume(folder: "Path", mirror: str | None) -> "Objective":
    """Continue the run in a folder from its last checkpoint, with copies in a mirror."""
    from finetune.run.run import resume as resume_run

    return resume_run(folder, mirror)


def main() -> None:
    """Start the Hydra application. The console script `finetune` calls this."""
    hydra_app(task, resume)


if __name__ == "__main__":
    main()
