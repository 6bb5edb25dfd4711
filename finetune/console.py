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


def run_command(command: Callable[[], object]) -> None:
    """Run a command; any error becomes one line on stderr and exit code 1, the traceback with HYDRA_FULL_ERROR=1."""
    full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"
    signal.signal(signal.SIGTERM, _terminate)
    try:
        command()
    except (Exception, KeyboardInterrupt) as error:
        if full_error:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)


def _terminate(signal_number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def one_line(error: BaseException) -> str:
    """What went wrong, in one line for a user."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _hydra_line(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, ConfigError | Interrupted):
        return " ".join(str(error).split())
    return f"{type(error).__name__}: {summary_line(error)} (HYDRA_FULL_ERROR=1 shows where)"


def summary_line(error: BaseException) -> str:
    """A foreign error's message on one line, its beginning if it is long."""
    return " ".join(str(error).split())[:300]


def _hydra_line(error: Exception) -> str:
    """Hydra's and OmegaConf's errors of several lines as one, with the nearest names."""
    from hydra.errors import MissingConfigException

    text = str(error)
    if isinstance(error, MissingConfigException) and error.options is not None and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return f"{group}={choice}: no such choice; {did_you_mean(choice, error.options)}"
    unknown = re.search(r"Could not override '([^']*)'", text)
    if unknown:
        return f"{unknown[1]}: no such key; {_known_keys(unknown[1])}"
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    cause = error.__cause__
    if cause is not None and str(cause).splitlines() and str(cause).splitlines()[0] not in text:
        lines.append(str(cause).splitlines()[0])
    noise = ("provider=", "full_key:", "object_type=", "reference_type=", "Config search path", "Set the environment")
    return "; ".join(line.rstrip(".;") for line in lines if not line.startswith(noise))


def _known_keys(key: str) -> str:
    """The keys beside an unknown one."""
    from omegaconf import DictConfig, OmegaConf

    sweeper = key.startswith("hydra.sweeper.")
    *path, last = key.removeprefix("hydra.sweeper.").split(".")
    node: Any = OmegaConf.load(CONF / ("hydra/sweeper/optuna.yaml" if sweeper else "config.yaml"))
    for part in path:
        node = node.get(part) if isinstance(node, DictConfig) and part in node else None
    return did_you_mean(last, [str(name) for name in node if name != "defaults"]) if node else "see --cfg job"


def refuse_flag(message: str) -> NoReturn:
    """An argparse error handler that leaves printing and the exit code to `run_command`."""
    raise ConfigError(f"{message}; see --help")


def command_parser(description: str) -> argparse.ArgumentParser:
    """A parser for the small commands, whose errors are one line with exit code 1 as well."""
    parser = argparse.ArgumentParser(description=description)
    parser.error = refuse_flag  # type: ignore[method-assign]
    return parser


def quiet_libraries(bars: bool = True) -> None:
    """Keep the libraries' remarks to their own developers, and their bars where there is no terminal, off the screen.

    Called before torch and transformers are imported.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for library in ("transformers", "peft", "trl", "accelerate", "bitsandbytes"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{library}\.")
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")  # we say so ourselves
    if not (bars and sys.stderr.isatty()):
        from huggingface_hub.utils.tqdm import disable_progress_bars
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bars()
        disable_progress_bar()


def note_traceback(error: BaseException) -> None:
    """Keep the traceback of an unexpected error in the run's log, where it does not bury the one line."""
    if not isinstance(error, ConfigError | Interrupted | KeyboardInterrupt):
        text = "".join(traceback.format_exception(error))
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.FileHandler):
                handler.emit(log.makeRecord(log.name, logging.ERROR, "", 0, text, (), None))
