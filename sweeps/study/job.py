"""A trial as a Hydra job: its folder, its files, its callbacks, as `hydra.core.utils.run_job` has them.

Hydra's own function runs a job to its end; these take turns with others in the same process.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from finetune.engine.steps import RunSteps

T = TypeVar("T")


def run_as_job(
    config: DictConfig, context: HydraContext, task: Callable[[DictConfig], RunSteps[T]]
) -> RunSteps[JobReturn]:
    """Run a task on a composed config as one of several jobs; what it raises is in the job's return.

    The task reads its config when it is called, and does its work in turns.
    """
    folder = Path(config.hydra.sweep.dir, config.hydra.sweep.subdir).absolute()
    with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
        config.hydra.runtime.output_dir = str(folder)
    done = JobReturn()
    with hydra_config(config):
        done.cfg = deepcopy(config)
        with read_write(done.cfg), open_dict(done.cfg):
            del done.cfg["hydra"]
        done.hydra_cfg = deepcopy(config)
        done.overrides = list(config.hydra.overrides.task)
        done.task_name, done.working_dir = config.hydra.job.name, str(Path.cwd())
        if config.hydra.output_subdir is not None:
            place = folder / config.hydra.output_subdir
            place.mkdir(parents=True, exist_ok=True)
            hydra_part = OmegaConf.masked_copy(config, "hydra")
            parts = {"config": done.cfg, "hydra": hydra_part, "overrides": config.hydra.overrides.task}
            for name, part in parts.items():
                (place / f"{name}.yaml").write_text(OmegaConf.to_yaml(part), encoding="utf-8")
        context.callbacks.on_job_start(config=config, task_function=task)
    try:
        with hydra_config(config):
            work = task(done.cfg)
        done.return_value = yield from work
        done.status = JobStatus.COMPLETED
    except BaseException as error:
        done.return_value, done.status = error, JobStatus.FAILED
        if not isinstance(error, Exception):
            raise
    finally:
        context.callbacks.on_job_end(config=config, job_return=done)
    return done


@contextmanager
def hydra_config(config: DictConfig) -> Iterator[None]:
    """Hydra's config of the moment, which `${hydra:…}` is resolved by."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before
