"""Runs and studies inside a process of the user: a notebook, a script, another Hydra application.

A command may change its process for good. Here everything that Hydra and a run change is as it was
when the call ends: Hydra's state, log handlers and levels, environment variables, memory.
"""

import contextlib
import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator

import hydra.version
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from finetune.compat import hidden_log_handlers
from finetune.console import error_line
from finetune.errors import ConfigError
from finetune.model.memory import free_memory, unfreeze_libraries
from finetune.run.resources import shared_resources

VARIABLES = ("CUDA_VISIBLE_DEVICES", "HYDRA_FULL_ERROR")
"""Environment variables that commands set."""

PACKAGES = ("finetune", "hydra", "hydra_plugins", "sweeps")
"""Packages whose log levels commands set."""


_CALLS = threading.Lock()
"""Held by the call that runs: Hydra, logging and the loaded base are one for the process."""


@contextlib.contextmanager
def in_process() -> Iterator[None]:
    """Leave the process as it was when the block ends, with or without an error.

    Raises:
        ConfigError: what Hydra or OmegaConf refuse, with the line that the command prints; or
            another call runs, in another thread or around this one.
    """
    if not _CALLS.acquire(blocking=False):
        raise ConfigError(
            "another run or study trains in this process: wait for its end"
        )
    # tqdm's remark in a notebook without ipywidgets; bars are shown on terminals only.
    warnings.filterwarnings("ignore", "IProgress not found")
    with contextlib.ExitStack() as stack:
        stack.callback(_CALLS.release)
        for restored in (_restored_hydra, _restored_logging, _restored_environment):
            stack.enter_context(restored())
        try:
            yield
        except BaseException as error:
            _clear_frames(error)
            if isinstance(error, HydraException | OmegaConfBaseException):
                raise ConfigError(error_line(error)) from error
            raise
        finally:
            _release_memory()


@contextlib.contextmanager
def _restored_hydra() -> Iterator[None]:
    """Let the block initialise Hydra although the user may have initialised it already."""
    application = GlobalHydra.instance().hydra
    config = HydraConfig.instance().cfg
    job_name = JobRuntime.instance().get("name")
    version_base = hydra.version.getbase()
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = application
        HydraConfig.instance().cfg = config
        JobRuntime.instance().set("name", job_name)
        hydra.version.VersionBase.instance().setbase(version_base)


@contextlib.contextmanager
def _restored_logging() -> Iterator[None]:
    """Let the block set up its logging; afterwards the user's handlers and levels are back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {logger.name: logger.level for logger in _package_loggers()}
    # `logging.basicConfig`, by which some commands set it up, does nothing beside other handlers.
    root.handlers.clear()
    try:
        with hidden_log_handlers():
            yield
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
        for logger in _package_loggers():
            logger.setLevel(levels.get(logger.name, logging.NOTSET))


def _package_loggers() -> list[logging.Logger]:
    """Return the loggers of this project and of Hydra that exist by now."""
    names = list(logging.root.manager.loggerDict)
    return [logging.getLogger(n) for n in names if n.partition(".")[0] in PACKAGES]


@contextlib.contextmanager
def _restored_environment() -> Iterator[None]:
    previous = {name: os.environ.get(name) for name in VARIABLES}
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _clear_frames(error: BaseException) -> None:
    """Clear the local variables of a failed call: they hold the base and its tensors.

    A notebook keeps the last error with its traceback, and so its memory too.
    """
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        traceback.clear_frames(current.__traceback__)
        waiting += [current.__cause__, current.__context__]


def _release_memory() -> None:
    shared_resources.release()
    unfreeze_libraries()
    # Also where nothing was shared: `generate` loads a base by itself.
    if "torch" in sys.modules:
        free_memory()
