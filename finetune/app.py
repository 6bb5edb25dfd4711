"""The Hydra application that all runs and studies start from: compose, check overrides, resume."""

import argparse
import contextlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override

from finetune.commands import explain_word
from finetune.compat import hydra_argument_parser
from finetune.config.keys import expand_short_form
from finetune.config.paths import CONF, PLAIN_NAME, is_plain_name
from finetune.config.plain_values import STUDY_EVAL_STEPS, resolve_study_eval_steps
from finetune.config.schema import RunConfig
from finetune.config.secrets import refuse_secrets_in
from finetune.console import VERSION, CommandParser, error_line, run_command
from finetune.errors import ConfigError, Interrupted, did_you_mean, refusal
from finetune.files.find_run import find_run
from finetune.files.run_folder import discard_multirun

log = logging.getLogger(__name__)


Task = Callable[[DictConfig], object]


def hydra_app(task: Task, resume: Callable[[Path], object]) -> None:
    """Compose `conf/` with the command line and call the task with it, as `hydra.main` does.

    Args:
        task: trains the run of a composed config; called once for each job.
        resume: continues the run in a folder; called instead of the task where the command line
            has `resume=RUN`.
    """
    run_command(lambda: _run_app(task, resume))


def _run_app(task: Task, resume: Callable[[Path], object]) -> None:
    # Before Hydra parses them, which prints several lines for a wrong flag and exits with 2.
    arguments = parse_hydra_arguments(sys.argv[1:])
    folder = _folder_to_resume(arguments)
    if folder is not None:
        resume(folder)
        return
    overrides: list[str] = arguments.overrides
    # In place, because `hydra.main` reads the command line itself.
    for position, word in enumerate(sys.argv[1:], start=1):
        if word in overrides:
            sys.argv[position] = check_override(word)
    # Hydra then raises its errors instead of printing them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    failures = _JobFailures()
    # By an absolute path: for a console script, Hydra takes a relative one for a package.
    decorate = hydra.main(config_path=str(CONF), config_name="config")
    application = decorate(failures.collect(task))
    # Hydra 1.4 gives no way to allow a callback without allowing every class in a config.
    own_callback = r"hydra\.utils\.instantiate\(\) resolved _target_='sweeps\.callback"
    warnings.filterwarnings("ignore", own_callback)
    with _explain_unusable_folder(overrides):
        application()
    failures.discard_empty_sweeps()
    failures.raise_first()


def parse_hydra_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse a command line as Hydra does. Raises ConfigError for a wrong flag."""
    # A command's name instead of an override: before its flags are refused as Hydra's.
    if arguments and re.fullmatch(r"[a-z]+", arguments[0]):
        raise ConfigError(explain_word(arguments[0]))
    parser = CommandParser(
        parents=[hydra_argument_parser()],
        add_help=False,
        conflict_handler="resolve",
    )
    version = f"{VERSION} (Hydra {hydra.__version__})"
    parser.add_argument("--version", action="version", version=version)
    # Hydra, too, takes flags between overrides.
    parsed = parser.parse_intermixed_args(arguments)
    for flag, value in (("--cfg", parsed.cfg), ("--info", parsed.info)):
        if parsed.multirun and value:
            raise ConfigError(f"{flag}: shows a single run; leave out -m")
    return parsed


def compose_run(overrides: list[str]) -> RunConfig:
    """Return the checked config of a command line, for commands that are no Hydra application.

    Raises:
        ConfigError: an override or the resulting config is not allowed.
    """
    return compose_sweep(overrides)[0]


def compose_sweep(
    overrides: list[str], multirun: bool = False
) -> tuple[RunConfig, dict[str, Any]]:
    """Return the checked config of a command line, and the keys of its sweeper.

    Args:
        overrides: the command line's overrides.
        multirun: whether values may be swept over; such a key then has the config's own value.

    Returns:
        The config, and `hydra.sweeper` with `hydra/sweeper=optuna`; else an empty dict.

    Raises:
        ConfigError: an override or the resulting config is not allowed.
    """
    checked = [check_override(override) for override in overrides]
    if multirun:
        parsed = OverridesParser.create().parse_overrides(checked)
        checked = [
            override
            for override, parts in zip(checked, parsed, strict=True)
            if not parts.is_sweep_override()
        ]
    with hydra.initialize_config_dir(str(CONF)):
        composed = hydra.compose("config", checked, return_hydra_config=True)
        sweeper: Any = OmegaConf.to_container(composed.hydra.sweeper)
        with flag_override(composed, "struct", False):
            del composed["hydra"]
        is_study = "n_trials" in sweeper
        if is_study:
            resolve_study_eval_steps(composed, STUDY_EVAL_STEPS)
        config = RunConfig.from_hydra(composed)
    return config, sweeper if is_study else {}


def check_override(override: str) -> str:
    """Return an override as Hydra accepts it.

    A short form gets its whole key. To some groups of keys any key may be added: `extra`,
    `dataset.columns` and `model.template_kwargs`.

    Raises:
        ConfigError: the override holds a credential, names a folder that is not plain, or has a
            number or null where a choice of a group belongs.
    """
    refuse_secrets_in(override)
    key, _, value = override.partition("=")
    if key == "name":
        # A sweep has several, as `name=a,b`.
        for name in value.split(","):
            if not is_plain_name(name):
                raise refusal(key, value, PLAIN_NAME)
    if (CONF / key).is_dir() and (value.isdigit() or value == "null"):
        choices = [file.stem for file in (CONF / key).glob("*.yaml")]
        raise refusal(key, value, f"no such choice; {did_you_mean(value, choices)}")
    open_groups = (
        r"((model|lora|trainer)\.extra|dataset\.columns|model\.template_kwargs)\b"
    )
    # Hydra refuses a new key without `+`, and an existing one with it; `++` allows both.
    adds_key = re.match(open_groups, override)
    return f"++{override}" if adds_key else expand_short_form(override)


def _folder_to_resume(arguments: argparse.Namespace) -> Path | None:
    """Return the folder of `resume=RUN`, or None where the command line starts a new run.

    A resumed run keeps the config that it started with, so no other override is allowed.
    """
    if arguments.cfg or arguments.help or arguments.info:
        return None
    overrides: list[str] = arguments.overrides
    resumes = []
    for override in overrides:
        if override.lstrip("+").startswith("resume="):
            resumes.append(override)
    if not resumes:
        return None
    name = resumes[0].partition("=")[2].strip("'\"")
    if not name:
        raise refusal("resume", name, "must be a run folder, a run's name, or latest")
    for override in overrides:
        if override not in resumes:
            raise ConfigError(
                f"{override}: resume takes no other override; a run continues with its own config"
            )
    return find_run("resume", name)


@contextlib.contextmanager
def _explain_unusable_folder(overrides: list[str]) -> Iterator[None]:
    """Name the key `hydra.run.dir` where Hydra can't create the folder of the run."""
    try:
        yield
    except (
        FileNotFoundError,
        FileExistsError,
        NotADirectoryError,
        PermissionError,
    ) as error:
        if error.filename is None:
            raise
        values = {}
        for override in overrides:
            key, _, value = override.partition("=")
            values[key] = value
        folder = values.get("hydra.run.dir", error.filename)
        reason = f"can't be created ({error.strerror}: {error.filename})"
        raise refusal("hydra.run.dir", folder, reason) from error


@dataclass(frozen=True)
class _JobFailures:
    """Errors of the jobs that ran in this process.

    They are collected, because Hydra prints several lines for an error, and ends a sweep at its
    first one.
    """

    errors: list[tuple[int | None, BaseException]] = field(default_factory=list)
    """The number of the job in its sweep (None: a single run), and its error."""

    sweep_folders: set[Path] = field(default_factory=set)
    """Folders of the sweeps in which a job failed."""

    def collect(self, task: Task) -> Task:
        """Return a task that does the same, and adds its error here instead of raising it."""

        def run_job(composed: DictConfig) -> object:
            # The job may run in another process: its error comes back through Hydra.
            if _launcher_reports_errors():
                return task(composed)
            try:
                return task(composed)
            except (Exception, KeyboardInterrupt) as error:
                is_interrupt = isinstance(error, KeyboardInterrupt | Interrupted)
                # It ends the whole sweep; any other error only its job.
                if is_interrupt and _is_multirun():
                    raise
                self._add(error)
                return None

        return run_job

    def discard_empty_sweeps(self) -> None:
        """Remove the folders of sweeps in which no job began."""
        for folder in self.sweep_folders:
            discard_multirun(folder)

    def raise_first(self) -> None:
        """Raise the first error, for a sweep with the number of its job and of all that failed."""
        if not self.errors:
            return
        job, error = self.errors[0]
        if job is None:
            raise error
        raise ConfigError(f"{len(self.errors)} failed; job {job}: {error_line(error)}")

    def _add(self, error: BaseException) -> None:
        if not _is_multirun():
            self.errors.append((None, error))
            return
        number = HydraConfig.get().job.num
        log.error("job %s failed: %s", number, error_line(error))
        self.errors.append((number, error))
        self.sweep_folders.add(Path(HydraConfig.get().sweep.dir))


def _is_multirun() -> bool:
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def _launcher_reports_errors() -> bool:
    """Whether the current job belongs to a sweep whose launcher reports its jobs' errors itself.

    Hydra's basic launcher does not.
    """
    launcher = str(HydraConfig.get().launcher.get("_target_"))
    return _is_multirun() and "BasicLauncher" not in launcher
