"""Credentials in a config are refused before they reach a file, a log or a tracker."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from finetune.config.addresses import refuse_secrets_in_address
from finetune.config.command_secrets import COMMAND_KEY, refuse_secrets_in_command
from finetune.config.mirror_address import refuse_secrets_in_mirror
from finetune.errors import ConfigError

STORAGE_KEY = "hydra.sweeper.storage"
"""The config key of a database address, which may hold a password."""


_SECRET_KEY = (
    r"((hf|hub|auth|use_auth|access|wandb)_)?token"
    r"|(\w+_)?(api_key|password|secret|secret_key)"
)


_SECRET_IN_OVERRIDE = re.compile(
    rf"(?i)(?:^\+*|[.{{,])\s*['\"]?({_SECRET_KEY})['\"]?\s*[=:]\s*(?!null|\$|['\"]['\"])[^\s,}}]"
)
"""A secret key with a value other than null, an interpolation, or an empty text."""


_TOKEN = re.compile(
    r"(?<![a-zA-Z0-9])("
    r"hf_[a-zA-Z0-9]{30,}|sk-(?=[\w-]*\d)[\w-]{32,}|wandb_v1_\w{20,}"
    r"|gh[opsru]_[a-zA-Z0-9]{36,}|github_pat_\w{22,})"
)
"""Tokens of services that have a prefix, as any value. W&B's older keys look like a git commit."""


def refuse_secrets(values: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse nested values that hold a credential.

    Args:
        values: a config, or a section of it.
        prefix: the dotted key of the section, with a dot at its end.

    Raises:
        ConfigError: a key that names a credential has a text as its value, or another key has a
            token with a well-known prefix.
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            refuse_secrets(value, f"{prefix}{key}.")
            continue
        names_secret = re.fullmatch(rf"(?i){_SECRET_KEY}", str(key))
        if names_secret and isinstance(value, str) and value:
            raise ConfigError(_secret_refusal(f"{prefix}{key}"))
        if _TOKEN.search(str(value)):
            raise ConfigError(_secret_refusal(f"{prefix}{key}"))


def refuse_secrets_in(override: str) -> None:
    """Refuse an override that holds a credential, before Hydra writes it to files.

    Raises:
        ConfigError: a credential, or an address with a password. Neither is repeated.
    """
    secret = _SECRET_IN_OVERRIDE.search(override)
    if secret:
        raise ConfigError(_secret_refusal(secret[1]))
    if _TOKEN.search(override):
        raise ConfigError(_secret_refusal(_TOKEN.split(override)[0].partition("=")[0]))
    for address in _addresses_in(override):
        refuse_secrets_in_address(STORAGE_KEY, address)
    key, _, text = override.lstrip("+").partition("=")
    if key == "mirror":
        refuse_secrets_in_mirror(text.strip("'\""))
    if key == COMMAND_KEY:
        value = _parsed_value(override)
        words = value if isinstance(value, list) else text.strip("[]").split(",")
        refuse_secrets_in_command([str(word) for word in words])


def _secret_refusal(key: str) -> str:
    """Return the error message for a credential, which does not show it."""
    return (
        f"{key}: a credential in a config would be written to files; "
        "set HF_TOKEN or WANDB_API_KEY instead"
    )


def _addresses_in(override: str) -> list[str]:
    """Return the database addresses in an override: as it is written, and as Hydra reads it.

    The written text counts as well, because Hydra's message about a text that it can't parse would
    repeat it.
    """
    key, _, text = override.partition("=")
    is_storage = key.endswith("storage")
    if not is_storage and not re.search(r"storage['\"]?\s*:", text):
        return []
    written = [text.strip(" '\"")]
    if not is_storage:
        written = re.findall(r"[\w+]+://[^\s,'\"]+", text)
    addresses = [*written, *_parsed_addresses(override, is_storage)]
    no_addresses = ("", "null", "None", "???")
    return [address for address in addresses if address not in no_addresses]


def _parsed_addresses(override: str, is_storage: bool) -> list[str]:
    value = _parsed_value(override)
    values = [value] if is_storage else list(_values_of("storage", value))
    return [str(value) for value in values if value is not None]


def _parsed_value(override: str) -> object:
    """Return the value of an override; None where it has none, or several."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        return OverridesParser.create().parse_override(override).value()
    except Exception:
        # Hydra reports it itself, or the override is a sweep.
        return None


def _values_of(key: str, tree: object) -> Iterator[object]:
    """Yield the values that nested mappings have for a key."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            if str(name) == key:
                yield value
            yield from _values_of(key, value)
