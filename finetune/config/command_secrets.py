"""Credentials in the words of `notify.command`, refused before they reach a file.

The config is written to files, `${oc.env:NAME}` with the variable's value. The command has the
environment of the run: a script or `sh -c` reads a credential from there.
"""

import itertools
import re
from collections.abc import Mapping, Sequence

from finetune.errors import ConfigError

COMMAND_KEY = "notify.command"

_NAME = r"(token|password|secret|api[_-]?key)"

_SECRETS = (
    # A password in an address.
    r"://[^/\s:@]*:(?!\$)[^/\s@]+@",
    # Addresses of webhooks: whoever has one can post.
    r"hooks\.slack\.com/|discord(app)?\.com/api/webhooks/|webhook\.office\.com/",
    rf"{_NAME}['\"]?\s*[=:]\s*(?!\$|['\"]\$)[^\s'\"]",
    r"\b(bearer|basic)\s+(?!\$)[^\s'\"]",
)
"""Words with a credential; `$NAME` in its place is none."""

_SECRET_FLAG = rf"--?([\w-]+[_-])?{_NAME}"
"""A flag whose argument is the next word."""


def command_words(notify: object) -> list[str]:
    """Return the words of the command in the plain values of a section `notify`, as texts."""
    command = notify.get("command") if isinstance(notify, Mapping) else None
    words = command if isinstance(command, list) else [command or ""]
    return [str(word) for word in words]


def refuse_secrets_in_command(words: Sequence[str]) -> None:
    """Refuse a command that holds a credential. Raises ConfigError, which does not show it."""
    for word, next_word in itertools.pairwise([*words, ""]):
        is_flag = bool(re.fullmatch(_SECRET_FLAG, word, re.IGNORECASE))
        has_argument = is_flag and bool(next_word) and not next_word.startswith("$")
        matches = (re.search(pattern, word, re.IGNORECASE) for pattern in _SECRETS)
        if has_argument or any(matches) or "${oc.env" in word:
            raise ConfigError(
                f"{COMMAND_KEY}: a credential in a config would be written to files; let a script "
                "read it from the environment, or sh, as [sh,-c,'… \"$NAME\"']"
            )
