"""The Hydra application that all runs and studies start from: compose, check overrides, resume."""

import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config.paths import CONF, PLAIN_NAME, is_plain_name
from finetune.config.secrets import refuse_secrets_in
from finetune.console import one_line, refuse_flag, run_command
from finetune.errors import ConfigError, Interrupted, did_you_mean, refusal

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from finetune.config.schema import RunConfig


log = logging.getLogger(__name__)


def hydra_app(task: Callable[["DictConfig"], object], resume: Callable[[str], object]) -> None:
    """Compose `conf/` with the command line and call the task with the result, as `hydra.main` does.

    Args:
        task: Trains the run of a composed config; called once for each job.
        resume: Goes on with the run in a folder; called instead where the command line has `resume=FOLDER`.
    """
    run_command(lambda: _hydra_app(task, resume))


def _hydra_app(task: Callable[["DictConfig"], object], resume: Callable[[str], object]) -> None:
    import hydra
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.error = refuse_flag  # type: ignore[method-assign]
    arguments = parser.parse_intermixed_args()
    given: list[str] = arguments.overrides
    resumed = [override for override in given if override.lstrip("+").startswith("resume=")]
    if resumed and not (arguments.cfg or arguments.help or arguments.info):
        others = [override for override in given if override not in resumed]
        resume(_run_to_resume(resumed[0].partition("=")[2], others))
        return
    sys.argv[1:] = [check_override(word) if word in given else word for word in sys.argv[1:]]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing; `run_command` prints
    errors: list[tuple[int | None, BaseException]] = []
    sweeps: set[Path] = set()
    try:
        hydra.main(config_path=str(CONF), config_name="config")(_keeping_errors(task, errors, sweeps))()
    except (FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError) as error:
        if error.filename is None:
            raise
        asked = (override.partition("=") for override in given)
        folder = next((value for key, _, value in asked if key == "hydra.run.dir"), error.filename)
        raise refusal("hydra.run.dir", folder, f"can't be made ({error.strerror}: {error.filename})") from error
    if sweeps:
        from finetune.files.run_folder import discard_multirun

        for sweep in sweeps:
            discard_multirun(sweep)
    if errors:
        job, first = errors[0]
        if job is not None:
            raise ConfigError(f"{len(errors)} failed; job {job}: {one_line(first)}")
        raise first


def compose_run(overrides: list[str]) -> "RunConfig":
    """The checked config of a command line, for commands that are no Hydra application."""
    from hydra import compose, initialize_config_dir

    from finetune.config.schema import RunConfig

    with initialize_config_dir(str(CONF)):
        return RunConfig.from_hydra(compose("config", [check_override(word) for word in overrides]))


def _run_to_resume(folder: str, others: list[str]) -> str:
    """The folder of a run that is resumed with its own config, so that no other override can hold."""
    if not folder:
        raise refusal("resume", folder, "must be a run folder")
    if others:
        raise ConfigError(f"{others[0]}: resume takes no other override; a run goes on as it began")
    return folder.strip("'\"")


def _keeping_errors(
    task: Callable[["DictConfig"], object], errors: list[tuple[int | None, BaseException]], sweeps: set[Path]
) -> Callable[..., object]:
    """The task, its error and job kept for `run_command`: Hydra would print lines, and end a sweep's other jobs.

    The folders of sweeps whose jobs failed are kept too: where no job began they are not left behind.
    """

    def kept(composed: "DictConfig") -> object:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        if "BasicLauncher" not in HydraConfig.get().launcher._target_ and HydraConfig.get().mode == RunMode.MULTIRUN:
            return task(composed)  # another process, whose errors come back through Hydra
        try:
            return task(composed)
        except (Exception, KeyboardInterrupt) as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                if isinstance(error, KeyboardInterrupt | Interrupted):
                    raise
                log.error("job %s failed: %s", HydraConfig.get().job.num, one_line(error))
                errors.append((HydraConfig.get().job.num, error))
                sweeps.add(Path(HydraConfig.get().sweep.dir))
            else:
                errors.append((None, error))
            return None

    return kept


def check_override(override: str) -> str:
    """An override as Hydra takes it: `extra` takes any key; no credential, and no number for a choice, passes."""
    refuse_secrets_in(override)
    key, _, value = override.partition("=")
    if key == "name" and not all(is_plain_name(name) for name in value.split(",")):
        raise refusal(key, value, PLAIN_NAME)
    if (CONF / key).is_dir() and value.isdigit():
        choices = [file.stem for file in (CONF / key).glob("*.yaml")]
        raise refusal(key, value, f"no such choice; {did_you_mean(value, choices)}")
    return f"++{override}" if re.match(r"(model|lora|trainer)\.extra\b", override) else override
