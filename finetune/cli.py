"""What all commands share: Hydra's application, and errors that end in one clear line with exit code 1."""

import argparse
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from finetune.config import PLAIN_NAME, ConfigError, did_you_mean, is_plain_name, refusal, refuse_secrets_in

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from finetune.config import RunConfig

PACKAGE = Path(__file__).resolve().parent
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())
"""The config folder: inside the package in an installed wheel, beside it in a checkout."""

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has stopped cleanly."""


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
    return f"{type(error).__name__}: {brief(error)} (HYDRA_FULL_ERROR=1 shows where)"


def brief(error: BaseException) -> str:
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


def hydra_app(task: Callable[["DictConfig"], object]) -> None:
    """Compose `conf/` with the command line and call the task with the result, as `hydra.main` does."""
    run_command(lambda: _hydra_app(task))


def _hydra_app(task: Callable[["DictConfig"], object]) -> None:
    import hydra
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.error = refuse_flag  # type: ignore[method-assign]
    arguments = parser.parse_intermixed_args()
    given: list[str] = arguments.overrides
    resumed = [override for override in given if override.lstrip("+").startswith("resume=")]
    if resumed and not (arguments.cfg or arguments.help or arguments.info):
        _resume(resumed[0].partition("=")[2], [override for override in given if override not in resumed])
        return
    sys.argv[1:] = [_checked_override(word) if word in given else word for word in sys.argv[1:]]
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
        from finetune.records import discard_multirun

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

    from finetune.config import RunConfig

    with initialize_config_dir(str(CONF)):
        return RunConfig.from_hydra(compose("config", [_checked_override(word) for word in overrides]))


def _resume(folder: str, others: list[str]) -> None:
    """Go on with a run, whose config is its own and is not composed anew."""
    if not folder:
        raise refusal("resume", folder, "must be a run folder")
    if others:
        raise ConfigError(f"{others[0]}: resume takes no other override; a run goes on as it began")
    from finetune.run import resume

    resume(folder.strip("'\""))


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


def refuse_flag(message: str) -> NoReturn:
    """An argparse error handler that leaves printing and the exit code to `run_command`."""
    raise ConfigError(f"{message}; see --help")


def _checked_override(override: str) -> str:
    """An override as Hydra takes it: `extra` takes any key; no credential, and no number for a choice, passes."""
    refuse_secrets_in(override)
    key, _, value = override.partition("=")
    if key == "name" and not all(is_plain_name(name) for name in value.split(",")):
        raise refusal(key, value, PLAIN_NAME)
    if (CONF / key).is_dir() and value.isdigit():
        choices = [file.stem for file in (CONF / key).glob("*.yaml")]
        raise refusal(key, value, f"no such choice; {did_you_mean(value, choices)}")
    return f"++{override}" if re.match(r"(model|lora|trainer)\.extra\b", override) else override


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
