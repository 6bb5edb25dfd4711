"""Errors that a user can act on. Each message is one line; `console.run_command` prints it."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """Input that the user can correct. The message says what is wrong and what is allowed."""


class NoAnswer(ConfigError):
    """The input was accepted, and what came of it is no answer: nothing completed, for example."""


class Diverged(NoAnswer):
    """The loss or the gradient is NaN or infinite."""


class Interrupted(Exception):
    """A run or a study has stopped cleanly before its end; the same command goes on."""

    by_user = True
    """Whether it was asked to (Ctrl-C, SIGTERM). Calls from Python then raise KeyboardInterrupt."""

    goes_on_elsewhere = False
    """Whether another machine has the run by now: the copy in a mirror is that machine's."""


def refusal(key: str, value: object, allowed: str) -> ConfigError:
    """Return the error for a value that a key does not accept.

    Args:
        key: the dotted config key, or the flag of a command.
        value: the refused value; shown as YAML writes null and booleans.
        allowed: what the key accepts.
    """
    if value is None:
        shown: object = "null"
    elif isinstance(value, bool):
        shown = str(value).lower()
    else:
        shown = value
    return ConfigError(f"{key}={shown}: {allowed}")


def did_you_mean(
    word: str, allowed: Iterable[str], description: str | None = None
) -> str:
    """Return the names nearest to a mistyped word, followed by what is allowed.

    Args:
        word: The mistyped word.
        allowed: All allowed names.
        description: What is allowed, where that is more than the names.
    """
    names = sorted(allowed)
    nearest = difflib.get_close_matches(
        word,
        names,
        n=2,
        cutoff=0.5,
    )
    suggestion = f"did you mean {' or '.join(nearest)}? " if nearest else ""
    if description is not None:
        return f"{suggestion}must be {description}"
    return f"{suggestion}allowed: {', '.join(names)}"


def join_lines(text: str) -> str:
    """Return a text on one line."""
    return " ".join(text.split())


OUT_OF_MEMORY_PHRASES = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "MemoryError",
)
"""In messages of CUDA, PyTorch's CPU allocator and Python."""


def is_out_of_memory_error(error: BaseException) -> bool:
    """Return whether an error means that the GPU's or the host's memory was too small."""
    # PyTorch's own class, by its name: torch is not loaded here.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and is_out_of_memory_message(str(error))


def is_out_of_memory_message(message: str) -> bool:
    """Return whether an error message means that memory was too small."""
    return any(phrase in message for phrase in OUT_OF_MEMORY_PHRASES)
