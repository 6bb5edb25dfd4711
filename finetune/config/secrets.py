"""Credentials in a config are refused before they reach a file, a log or a tracker."""

import re
from collections.abc import Mapping
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
    key, _, value = override.partition("=")
    if key.endswith("storage") and re.search(r":[^/@]+@", value) and "${" not in value:
        advice = f"{key}='${{oc.env:NAME}}' takes it from an environment variable"
        raise ConfigError(f"{key}: a password in an address would be written to files; {advice}")


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
