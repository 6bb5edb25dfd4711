"""The Hydra application that all runs and studies start from: compose, check overrides, resume."""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from finetune.commands import explain_word
from finetune.compat import hydra_argument_parser
from finetune.config.keys import expand_short_form
from finetune.config.mirror_address import refuse_secrets_in_mirror
from finetune.config.paths import CONF, PLAIN_NAME, is_plain_name
from finetune.config.plain_values import STUDY_EVAL_STEPS, resolve_study_eval_steps
from finetune.config.schema import RunConfig
from finetune.config.secrets import refuse_secrets_in
from finetune.console import (
    VERSION,
    CommandParser,
    ignore_warnings,
    run_command,
    summary_line,
)
from finetune.errors import ConfigError, did_you_mean, refusal
from finetune.files.find_run import fetch_run, find_run
from finetune.files.mirror import Mirror
from finetune.job_failures import JobFailures, Task

Resume = Callable[[Path, str | None], object]
"""Continues the run in a folder, with copies in a mirror; None: those of the run's config."""


def hydra_app(task: Task, resume: Resume) -> None:
    """Compose `conf/` with the command line and call the task with it, as `hydra.main` does.

    Args:
        task: trains the run of a composed config; called once for each job.
        resume: called instead of the task where the command line has `resume=RUN`.
    """
    run_command(lambda: run_app(task, resume))


def run_app(task: Task, resume: Resume) -> None:
    """Do what `hydra_app` does, for a command that has the arguments in `sys.argv` already.

    Its errors are raised.
    """
    # Before Hydra parses them, which prints several lines for a wrong flag and exits with 2.
    arguments = parse_hydra_arguments(sys.argv[1:])
    overrides: list[str] = arguments.overrides
    only_shows = arguments.cfg or arguments.help or arguments.info
    resumed = None if only_shows else run_to_resume(overrides)
    if resumed is not None:
        resume(*resumed)
        return
    # In place, because `hydra.main` reads the command line itself.
    for position, word in enumerate(sys.argv[1:], start=1):
        if word in overrides:
            sys.argv[position] = check_override(word)
    with _collected_failures(overrides) as failures:
        # By an absolute path: for a console script, Hydra takes a relative one for a package.
        decorate = hydra.main(config_path=str(CONF), config_name="config")
        application = decorate(failures.collect(task))
        application()


def run_overrides(overrides: Sequence[str], task: Task, multirun: bool = False) -> Any:
    """Do what `hydra_app` does with overrides, in a process that goes on afterwards.

    Hydra must not be initialised: `finetune.in_process` sees to that.

    Args:
        overrides: the overrides, as on a command line.
        task: trains the run of a composed config; called once for each job.
        multirun: whether a sweeper runs, as with the flag -m.

    Returns:
        Hydra's `JobReturn`; of a multirun what its sweeper returns.

    Raises:
        ConfigError: a word is no override, or the config is not allowed.
    """
    require_overrides(overrides)
    parsed: list[str] = parse_hydra_arguments(list(overrides)).overrides
    checked = [check_override(word) for word in parsed]
    with (
        _collected_failures(checked) as failures,
        hydra.initialize_config_dir(str(CONF)),
    ):
        application = GlobalHydra.instance().hydra
        assert application is not None
        job = failures.collect(task)
        if multirun:
            return application.multirun(
                "config", job, [*checked, "hydra.mode=MULTIRUN"]
            )
        return application.run("config", job, checked)


def require_overrides(words: Sequence[str]) -> None:
    """Raise ConfigError for what is no text, and for flags of the command line."""
    for word in words:
        if not isinstance(word, str):
            raise ConfigError(f"{word!r}: must be a text KEY=VALUE, as 'lora.r=8'")
        if word.startswith("-"):
            raise ConfigError(
                f"{word}: is a flag of the command line; from Python KEY=VALUE only"
            )


@contextlib.contextmanager
def _collected_failures(overrides: list[str]) -> Iterator[JobFailures]:
    """Collect the errors of the jobs that run in the block, and raise the first one at its end."""
    # Hydra then raises its errors instead of printing them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Hydra 1.4 gives no way to allow a callback without allowing every class in a config.
    own_callback = r"hydra\.utils\.instantiate\(\) resolved _target_='sweeps\.callback"
    ignore_warnings(own_callback)
    failures = JobFailures()
    with _explain_unusable_folder(overrides):
        yield failures
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


def run_to_resume(overrides: Sequence[str]) -> tuple[Path, str | None] | None:
    """Return folder and mirror of `resume=RUN`, or None where the overrides start a new run.

    A resumed run keeps the config that it started with, so no other override is allowed than
    `mirror`, from which the run is fetched if it is not here, and to which it is copied.

    Raises:
        ConfigError: there is another override, or no such run.
    """
    values = {}
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        values[key] = value.strip("'\"")
    if "resume" not in values:
        return None
    name = values.pop("resume")
    if not name:
        raise refusal("resume", name, "must be a run folder, a run's name, or latest")
    mirror = values.pop("mirror", None)
    for key, value in values.items():
        raise ConfigError(
            f"{key}={value}: resume takes no other override than mirror; a run continues with its "
            "own config"
        )
    if not mirror:
        return find_run("resume", name), None
    # Hydra, which resolves `${oc.env:NAME}`, is not started here.
    try:
        mirror = str(OmegaConf.create({"mirror": mirror}).mirror)
    except OmegaConfBaseException as error:
        raise refusal("mirror", mirror, summary_line(error)) from None
    refuse_secrets_in_mirror(mirror)
    return fetch_run(Mirror(mirror), name), mirror


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
