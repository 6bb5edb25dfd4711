"""The terminal: errors as one line with an exit code, argument parsers, quiet libraries."""

import argparse
import contextlib
import difflib
import json
import logging
import os
import re
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from finetune.compat import accept_negative_numbers
from finetune.config.keys import unknown_key
from finetune.errors import (
    ConfigError,
    Interrupted,
    NoAnswer,
    did_you_mean,
    is_out_of_memory_error,
    join_lines,
    refusal,
)
from finetune.exit_codes import INTERRUPTED, MISTAKE, NO_ANSWER
from finetune.hydra_errors import hydra_error_line
from finetune.interrupt_signals import raised_interrupts
from finetune.json_safe import json_safe
from finetune.version import __version__

log = logging.getLogger(__name__)


VERSION = f"qlora-sweeps {__version__}"
"""What `--version` prints."""


UNKNOWN_SWEEPER_ARGUMENT = re.compile(
    r"(?P<sweeper>\w*Sweeper)\.__init__\(\) "
    r"got an unexpected keyword argument '(?P<name>\w+)'"
)
"""Python's message about a key that a sweeper does not have, added by `+`."""

STOCK_SWEEPER = (
    "hydra.sweeper._target_: OptunaSweeper of hydra-optuna-sweeper has not the keys of a study; "
    "leave _target_ out, or write sweeps.sweeper.StudySweeper, which takes the same keys and more"
)
"""The error for another application's config, which names the stock sweeper itself."""


SUMMARY_LENGTH = 300
"""Characters of another library's error message that are shown."""


LOG_FORMAT = "[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"
"""The format of lines in a `train.log`: that of Hydra's own job logs."""


def run_command(command: Callable[[], object]) -> None:
    """Run a command. An error becomes one line on stderr, and an exit code: see `exit_code`.

    With HYDRA_FULL_ERROR=1 in the environment the error is shown with its traceback. SIGTERM
    interrupts the command as Ctrl-C does. Where the reader of stdout has gone (`| head`), the
    command ends without an error.
    """
    shows_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    signal.signal(signal.SIGTERM, _interrupt)
    if not sys.stderr.isatty():
        _hide_download_bars()
    with raised_interrupts() as raised:
        try:
            _run_and_flush(command)
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, BrokenPipeError) and _has_lost_reader():
                return
            cause = KeyboardInterrupt() if raised.explain(error) else error
            if shows_traceback:
                traceback.print_exc()
            else:
                print(f"error: {error_line(cause)}", file=sys.stderr)
            sys.exit(exit_code(cause))


def _run_and_flush(command: Callable[[], object]) -> None:
    """Run a command, and write what it has printed.

    Not when the process ends, because then nobody notices that the reader has gone.
    """
    try:
        command()
    except SystemExit:
        # As Hydra ends `--help`.
        print(end="", flush=True)
        raise
    print(end="", flush=True)


def exit_code(error: BaseException) -> int:
    """Return the exit code of a command that ends by an error."""
    if isinstance(error, KeyboardInterrupt | Interrupted):
        return INTERRUPTED
    if isinstance(error, NoAnswer) or is_out_of_memory_error(error):
        return NO_ANSWER
    return MISTAKE


def _has_lost_reader() -> bool:
    """Return whether nobody reads stdout any more; what is left for it is discarded then."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    # A pipe without a reader is reported though no event was asked for.
    if not poll.poll(0):
        return False
    # Python writes what is left once more when it ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


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
        return hydra_error_line(error)
    if isinstance(error, OSError) and error.strerror:
        if error.filename:
            return f"{error.strerror}: {error.filename}"
        return error.strerror
    if isinstance(error, ConfigError | Interrupted):
        return join_lines(str(error))
    argument = UNKNOWN_SWEEPER_ARGUMENT.search(str(error))
    if argument and argument["sweeper"] == "OptunaSweeper":
        return STOCK_SWEEPER
    if argument:
        return unknown_key(f"hydra.sweeper.{argument['name']}")
    return f"{type(error).__name__}: {summary_line(error)} (HYDRA_FULL_ERROR=1 shows where)"


def summary_line(error: BaseException) -> str:
    """Return the beginning of another library's error message, on one line."""
    return join_lines(str(error))[:SUMMARY_LENGTH]


@contextlib.contextmanager
def json_output(wanted: bool) -> Iterator[Callable[[Any], None]]:
    """Keep stdout for the JSON of a command: whatever else prints there goes to stderr.

    transformers prints a line when it is imported under WANDB_MODE=offline, for example, and a
    program that reads the JSON can't.

    Args:
        wanted: Whether `--json` was given. Otherwise nothing is redirected.

    Yields:
        A function that prints an object as JSON on stdout, NaN and infinities as null.
    """
    stdout = sys.stdout

    def print_json(content: Any) -> None:
        if stdout is None:  # closed; print would take that of errors
            return
        print(json.dumps(json_safe(content), indent=2), file=stdout, flush=True)

    target = sys.stderr if wanted else stdout
    with contextlib.redirect_stdout(target):
        yield print_json


class CommandParser(argparse.ArgumentParser):
    """A parser that leaves the printing of errors and the exit code to `run_command`."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        accept_negative_numbers(self)

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError where argparse would print the usage and exit with code 2."""
        choice = _INVALID_CHOICE.fullmatch(message)
        if choice:
            raise _choice_refusal(choice["name"], choice["value"], choice["choices"])
        number = _INVALID_NUMBER.fullmatch(message)
        if number:
            kind = "whole number" if number["type"] == "int" else "number"
            raise refusal(number["name"], number["value"], f"must be a {kind}")
        refused = _REFUSED_VALUE.fullmatch(message)
        if refused:
            raise refusal(refused["name"], refused["value"], refused["allowed"])
        flag = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        flags = re.findall(r"--[a-z][a-z-]*", self.format_usage())
        nearest = difflib.get_close_matches(flag[1], [*flags, "--help"]) if flag else []
        guess = f"did you mean {nearest[0]}? " if nearest else ""
        raise ConfigError(f"{message}; {guess}see --help")


_INVALID_CHOICE = re.compile(
    r"argument (?P<name>\S+): invalid choice: '(?P<value>.*)' \(choose from (?P<choices>.*)\)"
)
"""argparse's message about a word that is not among the allowed ones."""

_INVALID_NUMBER = re.compile(
    r"argument (?P<name>\S+): invalid (?P<type>int|float) value: '(?P<value>.*)'"
)

_REFUSED_VALUE = re.compile(
    r"argument (?P<name>\S+): (?P<value>.*): (?P<allowed>must be .*)"
)
"""The message where a function that reads a value raises ArgumentTypeError."""


def _choice_refusal(name: str, value: str, choices: str) -> ConfigError:
    """Return the error for a word that is not among the allowed ones.

    Args:
        name: the flag, or the argument's name in the help.
        value: the word.
        choices: the allowed words, as argparse lists them.
    """
    words = choices.replace("'", "").split(", ")
    if name != "COMMAND":
        return refusal(name, value, did_you_mean(value, words))
    allowed = did_you_mean(value, [*words, "--help"])
    return ConfigError(f"{value}: no such command; {allowed}")


def command_parser(module: str, description: str, *examples: str) -> CommandParser:
    """Return the parser of a command.

    Args:
        module: the module that is run, for example `finetune.plan`.
        description: what the command does, as its help prints it.
        examples: command lines behind the module's name, which the help shows.
    """
    command = f"python -m {module}"
    lines = [f"  {command} {example}" for example in examples]
    parser = CommandParser(
        prog=command,
        description=description,
        epilog="\n".join(["examples:", *lines]) if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=VERSION)
    return parser


def overrides_parser(module: str, description: str, *examples: str) -> CommandParser:
    """Return the parser of a command that takes the overrides of a run. Arguments: see above.

    Parse with `parse_intermixed_args`, so that flags may stand between overrides.
    """
    parser = command_parser(module, description, *examples)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="OVERRIDE",
        help="as python -m finetune accepts them",
    )
    add_json_argument(parser)
    return parser


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag `--json`."""
    text = "print JSON for programs (docs/json.md)"
    parser.add_argument("--json", action="store_true", help=text)


_ignored: list[tuple[Any, ...]] = []
"""The filters that `ignore_warnings` has added."""


def ignore_warnings(
    message: str = "", category: type[Warning] = Warning, module: str = ""
) -> None:
    """Ignore some warnings from now on; within `restored_warnings`, until its end.

    Args:
        message: regular expression of a message's beginning.
        category: class of the warnings.
        module: regular expression of the beginning of the name of the module that warns.
    """
    warnings.filterwarnings("ignore", message, category, module)
    # It has been inserted at the front.
    _ignored.append(warnings.filters[0])


@contextlib.contextmanager
def restored_warnings() -> Iterator[None]:
    """Remove the filters that `ignore_warnings` adds in the block when it ends.

    `warnings.catch_warnings` would also remove those of libraries that the block imports.
    """
    filters: list[Any] = warnings.filters  # type: ignore[assignment]
    before = filters[:]
    try:
        yield
    finally:
        others = [f for f in filters if f not in before and f not in _ignored]
        filters[:] = [*others, *before]
        _ignored.clear()


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
        ignore_warnings(category=FutureWarning, module=module)
    # The run logs this itself.
    ignore_warnings("Paged optimizers are not supported on CPU")
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
