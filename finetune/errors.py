"""Errors that users can act on: each message is one line."""

import difflib
from collections.abc import Iterable


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has stopped cleanly."""


class ConfigError(ValueError):
    """Input that the user can mend. The message is one line: what is wrong, and what is allowed."""


def refusal(key: str, value: object, allowed: str) -> ConfigError:
    """The error for a value that a key cannot have."""
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
    return ConfigError(f"{key}={shown}: {allowed}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The names nearest to a mistyped one, and all that exist."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=2, cutoff=0.5)
    return (f"did you mean {' or '.join(near)}? " if near else "") + f"allowed: {', '.join(names)}"


class Diverged(ConfigError):
    """The loss or the gradient is no number any more."""
