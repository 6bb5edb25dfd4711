"""Errors that a user can act on. Each message is one line; `console.run_command` prints it."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """Input that the user can correct. The message says what is wrong and what is allowed."""


class Diverged(ConfigError):
    """The loss or the gradient is NaN or infinite."""


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has stopped cleanly."""


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


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Return the names nearest to a mistyped word, followed by all allowed names."""
    names = sorted(allowed)
    nearest = difflib.get_close_matches(
        word,
        names,
        n=2,
        cutoff=0.5,
    )
    suggestion = f"did you mean {' or '.join(nearest)}? " if nearest else ""
    return f"{suggestion}allowed: {', '.join(names)}"


def join_lines(text: str) -> str:
    """Return a text on one line."""
    return " ".join(text.split())
