"""Runs and studies inside a process of the user: a notebook, a script, another Hydra application.

A command may change its process for good. Here everything that Hydra and a run change is as it was
when the call ends: Hydra's state, log handlers and levels, filters of warnings, environment
variables, the state of random numbers, memory.
"""

import contextlib
import logging
import os
import random
import sys
import threading
import traceback
from collections.abc import Iterator

import hydra.version
import numpy as np
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from finetune.compat import hidden_log_handlers
from finetune.console import error_line, ignore_warnings, restored_warnings
from finetune.errors import ConfigError, Interrupted
from finetune.interrupt_signals import interrupts_wait_for_imports, raised_interrupts
from finetune.model.memory import free_memory, unfreeze_libraries
from finetune.run.resources import shared_resources

PACKAGES = ("finetune", "hydra", "hydra_plugins", "sweeps")
"""Packages whose log levels commands set."""

READ_ONCE = "PYTORCH_ALLOC_CONF"
"""A variable that stays: PyTorch reads it when the process first uses a GPU, perhaps later."""


_CALLS = threading.Lock()
"""Held by the call that runs: Hydra, logging and the loaded base are one for the process."""


@contextlib.contextmanager
def in_process() -> Iterator[None]:
    """Leave the process as it was when the block ends, with or without an error.

    Raises:
        ConfigError: what Hydra or OmegaConf refuse, with the line that the command prints; or
            another call runs, in another thread or around this one.
        KeyboardInterrupt: Ctrl-C, and SIGTERM in training, also where the block stops cleanly
            after it.
    """
    if _CALLS.locked():
        raise ConfigError(
            "another run or study trains in this process: wait for its end"
        )
    # `with` also releases it where Ctrl-C comes as it is acquired.
    with (
        _CALLS,
        interrupts_wait_for_imports(),
        raised_interrupts() as raised,
        contextlib.ExitStack() as stack,
    ):
        for restored in (
            _restored_hydra,
            _restored_logging,
            restored_warnings,
            _restored_environment,
            _restored_random_numbers,
        ):
            stack.enter_context(restored())
        # tqdm's remark in a notebook without ipywidgets; bars are shown on terminals only.
        ignore_warnings("IProgress not found")
        try:
            yield
        except BaseException as error:
            _clear_frames(error)
            if raised.explain(error):
                raise KeyboardInterrupt from None
            if isinstance(error, HydraException | OmegaConfBaseException):
                raise ConfigError(error_line(error)) from error
            # Python's: `except Exception` around a call must not swallow the user's Ctrl-C.
            if isinstance(error, Interrupted) and error.by_user:
                raise KeyboardInterrupt(error_line(error)) from None
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
    levels = {logger.name: logger.level for logger in _loggers()}
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
        for logger in _loggers():
            # The level of another package's new logger is that package's choice.
            is_ours = logger.name.partition(".")[0] in PACKAGES
            new = logging.NOTSET if is_ours else logger.level
            logger.setLevel(levels.get(logger.name, new))


def _loggers() -> list[logging.Logger]:
    """Return the loggers that exist by now, without the root."""
    return [logging.getLogger(name) for name in list(logging.root.manager.loggerDict)]


@contextlib.contextmanager
def _restored_environment() -> Iterator[None]:
    """Restore the variables, also those that libraries set, as Accelerate does."""
    previous = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() | previous.keys():
            value = previous.get(name)
            if name == READ_ONCE or os.environ.get(name) == value:
                continue
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _restored_random_numbers() -> Iterator[None]:
    """Restore the state of global random numbers: a run seeds them, and the user's would repeat."""
    torch = sys.modules.get("torch")
    python, numpy = random.getstate(), np.random.get_state()
    cpu = torch.get_rng_state() if torch else None
    # A GPU that this process has not used yet would be used by asking.
    uses_gpu = torch is not None and torch.cuda.is_initialized()
    devices = torch.cuda.get_rng_state_all() if torch and uses_gpu else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if torch and cpu is not None:
            torch.set_rng_state(cpu)
        if torch and devices is not None:
            torch.cuda.set_rng_state_all(devices)


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
