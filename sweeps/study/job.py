"""A trial as a Hydra job: its folder, files and callbacks, as in `hydra.core.utils.run_job`.

Hydra's own function runs a job to its end. Here several jobs train together in one process, so the
job is a generator, see `finetune.engine.steps`.
"""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from finetune.engine.steps import RunSteps
from finetune.errors import refusal

T = TypeVar("T")


def run_as_job(
    config: DictConfig, context: HydraContext, task: Callable[[DictConfig], RunSteps[T]]
) -> RunSteps[JobReturn]:
    """Run a task on a composed config, as one of several jobs.

    Args:
        config: the job's config, with the `hydra` node.
        context: Hydra's context.
        task: is called with the config without the `hydra` node, and returns the job's steps.

    Returns:
        The job's return. It holds the exception that ended the task, if there was one.
    """
    sweep = config.hydra.sweep
    folder = Path(sweep.dir, sweep.subdir).absolute()
    with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
        config.hydra.runtime.output_dir = str(folder)
    with hydra_config(config) as stored:
        task_config = _without_hydra(config)
        job = _begin_job(config, task_config)
        if config.hydra.output_subdir is not None:
            subdirectory = folder / config.hydra.output_subdir
            _write_config_files(config, task_config, subdirectory)
        context.callbacks.on_job_start(config=config, task_function=task)
    try:
        # The task reads its config here. Its steps come later, between those of other jobs.
        with _set_hydra_config(stored):
            steps = task(task_config)
        job.return_value = yield from steps
        job.status = JobStatus.COMPLETED
    except BaseException as error:
        job.return_value = error
        job.status = JobStatus.FAILED
        # KeyboardInterrupt, SystemExit, and GeneratorExit of a closed run end more than this job.
        if not isinstance(error, Exception):
            raise
    finally:
        context.callbacks.on_job_end(config=config, job_return=job)
    return job


def require_one_directory(config: DictConfig) -> None:
    """Refuse a working directory for each of several jobs in one process.

    Raises:
        ConfigError: `hydra.job.chdir` is true.
    """
    if config.hydra.job.chdir:
        reason = (
            "runs that train together share one working directory: leave it false; "
            "a plain multirun has hydra/launcher=basic, which runs its jobs one by one"
        )
        raise refusal("hydra.job.chdir", config.hydra.job.chdir, reason)


def _without_hydra(config: DictConfig) -> DictConfig:
    # Half of the time of `deepcopy`.
    task_config: DictConfig = pickle.loads(pickle.dumps(config))
    with read_write(task_config), open_dict(task_config):
        del task_config["hydra"]
    return task_config


def _begin_job(config: DictConfig, task_config: DictConfig) -> JobReturn:
    job = JobReturn()
    job.cfg = task_config
    job.hydra_cfg = config
    job.overrides = list(config.hydra.overrides.task)
    job.task_name = config.hydra.job.name
    job.working_dir = str(Path.cwd())
    return job


def _write_config_files(
    config: DictConfig, task_config: DictConfig, folder: Path
) -> None:
    """Write `config.yaml`, `hydra.yaml` and `overrides.yaml`, as Hydra does for each job."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "config": task_config,
        "hydra": HydraConfig.instance().cfg,
        "overrides": config.hydra.overrides.task,
    }
    for name, content in contents.items():
        text = OmegaConf.to_yaml(content)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


@contextmanager
def hydra_config(config: DictConfig) -> Iterator[Any]:
    """Set the config by which `${hydra:…}` is resolved, while the context lasts.

    Yields:
        The config as Hydra stores it.
    """
    with _set_hydra_config(HydraConfig.instance().cfg):
        HydraConfig.instance().set_config(config)
        yield HydraConfig.instance().cfg


@contextmanager
def _set_hydra_config(stored: Any) -> Iterator[None]:
    """Set a config that Hydra has stored before, while the context lasts."""
    # It is one for the process, and the jobs of a pack take turns.
    previous = HydraConfig.instance().cfg
    HydraConfig.instance().cfg = stored
    try:
        yield
    finally:
        HydraConfig.instance().cfg = previous
