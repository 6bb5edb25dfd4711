"""The terminal: errors as one line with exit code 1, argument parsers, quiet libraries."""

import argparse
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from finetune.config.paths import CONF
from finetune.errors import ConfigError, Interrupted, did_you_mean

log = logging.getLogger(__name__)


HYDRA_NOISE = (
    "provider=",
    "full_key:",
    "object_type=",
    "reference_type=",
    "Config search path",
    "Set the environment",
)
"""Beginnings of lines in messages of Hydra and OmegaConf that tell a user nothing."""


SWEEP_WITHOUT_MULTIRUN = re.compile(
    r"(Ambiguous value for argument|Sweep parameters) '(?P<override>.*)'( requires --multirun)?$",
    re.MULTILINE,
)
"""Hydra's messages about sweep syntax without -m."""


UNPARSED_OVERRIDE = re.compile(
    r"Error when parsing index: \d+, string: (?P<override>.*?) out of \[", re.DOTALL
)
"""Hydra's message about an override that is against its grammar."""

WRONG_CALL = re.compile(r"while evaluating '.*?': (?!Unknown function)(?P<reason>.*)")
"""Hydra's message about one of its functions with wrong arguments: `choice()`."""


SUMMARY_LENGTH = 300
"""Characters of another library's error message that are shown."""


LOG_FORMAT = "[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"
"""The format of lines in a `train.log`: that of Hydra's own job logs."""


SWEEPER = "hydra.sweeper."


def run_command(command: Callable[[], object]) -> None:
    """Run a command. An error becomes one line on stderr and exit code 1.

    With HYDRA_FULL_ERROR=1 in the environment the error is raised, with its traceback. SIGTERM
    interrupts the command as Ctrl-C does.
    """
    shows_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    signal.signal(signal.SIGTERM, _interrupt)
    if not sys.stderr.isatty():
        _hide_download_bars()
    try:
        command()
    except (Exception, KeyboardInterrupt) as error:
        if shows_traceback:
            raise
        print(f"error: {error_line(error)}", file=sys.stderr)
        sys.exit(1)


def _interrupt(signal_number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _hide_download_bars() -> None:
    """Hide the bars of data and model downloads, which would fill a log file.

    By the environment, because the libraries read it when they are imported, and importing them
    here would delay every command.
    """
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def error_line(error: BaseException) -> str:
    """Return the error as one line for the user."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted"
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _hydra_error_line(error)
    if isinstance(error, OSError) and error.strerror:
        if error.filename:
            return f"{error.strerror}: {error.filename}"
        return error.strerror
    if isinstance(error, ConfigError | Interrupted):
        return _join_lines(str(error))
    return f"{type(error).__name__}: {summary_line(error)} (HYDRA_FULL_ERROR=1 shows where)"


def summary_line(error: BaseException) -> str:
    """Return the beginning of another library's error message, on one line."""
    return _join_lines(str(error))[:SUMMARY_LENGTH]


def _join_lines(text: str) -> str:
    return " ".join(text.split())


def _hydra_error_line(error: Exception) -> str:
    """Return an error of Hydra or OmegaConf as one line, with the nearest names."""
    from hydra.errors import MissingConfigException

    text = str(error)
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = str(error.missing_cfg_file or "").rpartition("/")
        if choice:
            return f"{group}={choice}: no such choice; {did_you_mean(choice, error.options)}"
    unknown = re.search(r"Could not override '([^']*)'", text)
    if unknown:
        return f"{unknown[1]}: no such key; {_suggest_key(unknown[1])}"
    sweep = SWEEP_WITHOUT_MULTIRUN.search(text)
    if sweep:
        return _sweep_refusal(sweep["override"])
    unparsed = UNPARSED_OVERRIDE.search(text)
    if unparsed:
        wrong_call = WRONG_CALL.search(text)
        if wrong_call:
            return f"{_join_lines(unparsed['override'])}: {wrong_call['reason']}"
        return _syntax_refusal(unparsed["override"])
    lines = [_join_lines(line) for line in text.splitlines() if line.strip()]
    cause = str(error.__cause__ or "").splitlines()
    if cause and cause[0] not in text:
        lines.append(cause[0])
    shown_lines = []
    for line in lines:
        if not line.startswith(HYDRA_NOISE):
            shown_lines.append(line.rstrip(".;"))
    return "; ".join(shown_lines)


def _sweep_refusal(override: str) -> str:
    """Return the error for sweep syntax on the command line of a single run."""
    key, _, values = override.partition("=")
    if "interval(" in values:
        return f"{override}: a range needs python -m finetune -m hydra/sweeper=optuna"
    remedy = "several values need python -m finetune -m"
    is_group = (CONF / key).is_dir()
    if not is_group and "(" not in values:
        remedy += f"; one list is {key}=[{values}]"
    return f"{override}: {remedy}"


def _syntax_refusal(override: str) -> str:
    """Return the error for an override that Hydra can't parse."""
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override}: must be KEY=VALUE"
    remedy = "text with special characters needs quotes"
    if not set(value) & set("'\"\\$\n"):
        remedy += f": '{key}=\"{value}\"'"
    return f"{_join_lines(override)}: is not Hydra's syntax; {remedy}"


def _suggest_key(unknown: str) -> str:
    """Return the keys nearest to an unknown one, and all keys of its group."""
    from omegaconf import DictConfig, OmegaConf

    file = "hydra/sweeper/optuna.yaml" if unknown.startswith(SWEEPER) else "config.yaml"
    *groups, name = unknown.removeprefix(SWEEPER).split(".")
    node: Any = OmegaConf.load(CONF / file)
    for group in groups:
        has_group = isinstance(node, DictConfig) and group in node
        node = node.get(group) if has_group else None
    if not node:
        return "see --cfg job"
    # Hydra's defaults list is no key of the config.
    keys = [str(key) for key in node if key != "defaults"]
    return did_you_mean(name, keys)


class CommandParser(argparse.ArgumentParser):
    """A parser that leaves the printing of errors and the exit code to `run_command`."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError where argparse would print the usage and exit with code 2."""
        raise ConfigError(f"{message}; see --help")


def command_parser(module: str, description: str) -> CommandParser:
    """Return the parser of a command.

    Args:
        module: the module that is run, for example `finetune.plan`.
        description: what the command does, as its help prints it.
    """
    return CommandParser(prog=f"python -m {module}", description=description)


def quiet_libraries(bars: bool = True) -> None:
    """Hide messages that libraries address to developers, and progress bars without a terminal.

    Called before torch and transformers are imported.

    Args:
        bars: whether a terminal may show progress bars.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Unset, tokenizers warns whenever a process that has used it forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for library in ("transformers", "peft", "trl", "accelerate", "bitsandbytes"):
        module = rf"{library}\."
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    # The run logs this itself.
    paged_on_cpu = "Paged optimizers are not supported on CPU"
    warnings.filterwarnings("ignore", message=paged_on_cpu)
    if not (bars and sys.stderr.isatty()):
        from huggingface_hub.utils.tqdm import disable_progress_bars
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bars()
        disable_progress_bar()


def log_to_stderr(*loggers: str) -> None:
    """Print what loggers say to stderr, from INFO on, for a command without Hydra's logging.

    Args:
        loggers: names of modules or packages.
    """
    logging.basicConfig(format="%(message)s")
    for name in loggers:
        logging.getLogger(name).setLevel(logging.INFO)


def log_traceback(error: BaseException) -> None:
    """Write the traceback of an unexpected error to the log files, but not to the terminal."""
    if isinstance(error, ConfigError | Interrupted | KeyboardInterrupt):
        return
    text = "".join(traceback.format_exception(error))
    # A record by hand, because a logger would send it to the terminal's handler as well.
    record = log.makeRecord(
        log.name,
        logging.ERROR,
        "",
        0,
        text,
        (),
        None,
    )
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.emit(record)
