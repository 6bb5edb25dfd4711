"""A run as a Hydra job: the composed config is checked, and the run gets Hydra's folder."""

import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from finetune.config.schema import RunConfig
from finetune.config.secrets import refuse_secrets_in
from finetune.console import error_line
from finetune.engine.steps import drive
from finetune.errors import ConfigError, refusal
from finetune.files.run_folder import (
    RunFolder,
    discard_if_untouched,
    discard_refused,
    is_new,
    record_refused,
)
from finetune.run.context import RunContext
from finetune.run.resources import shared_resources
from finetune.run.run import fetched_run_steps
from finetune.tracking.tracker import Label

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from finetune.engine.steps import RunSteps
    from finetune.run.result import Objective

log = logging.getLogger(__name__)


def check_job(composed: "DictConfig") -> RunConfig:
    """Check a job's config.

    Raises:
        ConfigError: No run can have this config.
    """
    _refuse_secrets_in_storage()
    if HydraConfig.get().mode == RunMode.RUN:
        _refuse_sweep_keys()
    # A run does not read the group `search`: it would train with the config's own values.
    for override in HydraConfig.get().overrides.task:
        if override.startswith("search"):
            command = "python -m finetune -m hydra/sweeper=optuna"
            reason = f"only the Optuna sweeper searches: {command}"
            raise ConfigError(f"{override}: {reason}")
    config = RunConfig.from_hydra(composed)
    if config.resume is not None:
        reason = "belongs on the command line: python -m finetune resume=RUN"
        raise refusal("resume", config.resume, reason)
    return config


def _refuse_sweep_keys() -> None:
    """Refuse overrides that only a sweep reads, on the command line of a single run."""
    overrides = HydraConfig.get().overrides
    for override in overrides.hydra:
        key = override.lstrip("+~").replace("/", ".")
        if key.startswith(("hydra.sweeper", "hydra.launcher")):
            words = shlex.join([*overrides.hydra, *overrides.task])
            command = f"python -m finetune -m {words}"
            raise ConfigError(f"{override}: has no effect without -m: {command}")
    chosen = HydraConfig.get().runtime.choices.get("hydra/sweeper", "basic")
    if chosen != "basic":
        # Chosen by a config file, which single runs may use as well.
        log.warning(
            "hydra/sweeper=%s has no effect without -m: this is one run", chosen
        )


def run_job(composed: "DictConfig") -> "Objective":
    """Check a job's config, and train its run. Arguments and errors are those of `job`."""
    return drive(job(composed))


def job(
    composed: "DictConfig", description: str = "", **context: Any
) -> "RunSteps[Objective]":
    """Check a job's config, and return the steps of its run.

    Args:
        composed: The job's config; Hydra's own part is that of the current job.
        description: What the job has that others of its sweep have not, for its name in trackers;
            empty: its number stands there.
        context: Further fields of `RunContext`.

    Returns:
        The steps of the run. Where its data or its base is refused, they remove the folder that
        Hydra made, unless the job belongs to a sweep: a sweep's folder shows which jobs failed.

    Raises:
        ConfigError: No run can have this config. The folder that Hydra made is removed; a sweep's
            folder keeps the reason.
    """
    hydra = HydraConfig.get()
    folder = RunFolder(hydra.runtime.output_dir)
    try:
        config = check_job(composed)
    except ValueError as error:
        discard_if_untouched(folder.path)
        if hydra.mode == RunMode.MULTIRUN:
            # The job may have another working directory.
            sweep_folder = Path(hydra.runtime.cwd, hydra.sweep.dir)
            record_refused(sweep_folder, hydra.job.num, error_line(error))
        raise
    label = Label()
    if hydra.mode == RunMode.MULTIRUN:
        sweep_folder = Path(hydra.sweep.dir).absolute()
        name = f"{config.name}-{hydra.job.num}"
        if description:
            name = f"{config.name} {description}"
        label = Label(
            name=name,
            group=sweep_folder.name,
            job_type="trial",
            folder=sweep_folder,
        )
    run_context = RunContext(
        resources=shared_resources, label=label, notifies=True, **context
    )
    steps = fetched_run_steps(config, folder, run_context)
    if hydra.mode == RunMode.RUN and is_new(folder):
        return _in_new_folder(steps, folder)
    return steps


def _in_new_folder(
    steps: "RunSteps[Objective]", folder: RunFolder
) -> "RunSteps[Objective]":
    """Run the steps; a refusal or Ctrl-C before the run has begun leaves no folder behind."""
    try:
        return (yield from steps)
    except (ConfigError, KeyboardInterrupt):
        discard_refused(folder)
        raise


def _refuse_secrets_in_storage() -> None:
    """Refuse a password in the sweeper's address: Hydra writes its whole config to files."""
    sweeper = OmegaConf.to_container(HydraConfig.get().sweeper, resolve=False)
    storage = sweeper.get("storage") if isinstance(sweeper, dict) else None
    refuse_secrets_in(f"hydra.sweeper.storage={storage}")
