"""Credentials in a config are refused before they reach a file, a log or a tracker."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from finetune.errors import ConfigError

_SECRET = r"((hf|hub|auth|use_auth|access|wandb)_)?token|(\w+_)?(api_key|password|secret|secret_key)"


def refuse_secrets_in(override: str) -> None:
    """Raise ConfigError if a credential stands in an override's text, before Hydra writes it to files."""
    found = re.search(
        rf"(?i)(?:^\+*|[.{{,])\s*['\"]?({_SECRET})['\"]?\s*[=:]\s*(?!null|\$|['\"]['\"])[^\s,}}]", override
    )
    if found:
        raise ConfigError(_secret_refusal(found[1]))
    for address in _addresses_in(override):
        from finetune.config.addresses import refuse_secrets_in_address  # and SQLAlchemy, which few commands need

        refuse_secrets_in_address("hydra.sweeper.storage", address)


def _addresses_in(override: str) -> list[str]:
    """What an override gives for `hydra.sweeper.storage`: its text, and the value that Hydra reads in it.

    The text counts as well: Hydra's message about a text that it can't read would repeat it.
    """
    key, _, text = override.partition("=")
    is_storage = key.endswith("storage")
    if not is_storage and not re.search(r"storage['\"]?\s*:", text):
        return []
    addresses = [text.strip(" '\"")] if is_storage else re.findall(r"[\w+]+://[^\s,'\"]+", text)
    addresses += _read_addresses(override, is_storage)
    return [address for address in addresses if address not in ("", "null", "None", "???")]


def _read_addresses(override: str, is_storage: bool) -> list[str]:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        value = OverridesParser.create().parse_override(override).value()
    except Exception:
        return []  # Hydra says so itself, or the override is a sweep
    values = [value] if is_storage else list(_values_of("storage", value))
    return [str(value) for value in values if value is not None]


def _values_of(key: str, tree: object) -> Iterator[object]:
    """The values that nested mappings have for a key."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            if str(name) == key:
                yield value
            yield from _values_of(key, value)


def refuse_secrets(values: Mapping[str, Any], path: str = "") -> None:
    """Raise ConfigError if a credential stands in the config, where files and trackers would show it."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            refuse_secrets(value, f"{path}{key}.")
        elif re.fullmatch(rf"(?i){_SECRET}", str(key)) and isinstance(value, str) and value:
            raise ConfigError(_secret_refusal(f"{path}{key}"))


def _secret_refusal(key: str) -> str:
    """What to do with a credential, without showing it."""
    return f"{key}: a credential in a config would be written to files; set HF_TOKEN or WANDB_API_KEY instead"
