"""Nested configs as flat mappings with dotted keys."""

from typing import Any


def flatten(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flatten(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return found
