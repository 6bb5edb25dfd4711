"""What `tracker.text=false` keeps out of trackers: texts of the config, and messages of errors."""

from collections.abc import Mapping
from typing import Any

from finetune.config.schema import RunConfig

HIDDEN = "hidden (tracker.text=false)"
"""Stands in a tracker in place of a text."""

TEXT_KEYS = (
    ("sample_prompts",),
    ("dataset", "template"),
    ("model", "chat_template"),
)
"""Config keys whose values are prompts, or templates that may hold some."""


def tracked_config(config: RunConfig) -> dict[str, Any]:
    """Return a run's config as trackers show it: nested plain values.

    The command of `notify` is for this machine, and none of a tracker's concern.
    """
    shown = hide_text(config.to_dict())
    del shown["notify"]
    return shown


def hide_text(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without its prompts, if its own `tracker.text` is false.

    Args:
        config: Nested plain values, as `run.json` holds them.

    Returns:
        A copy of its levels. Keys without a text (null, an empty list) keep their values.
    """
    shown = dict(config)
    if shows_text(config):
        return shown
    for *sections, key in TEXT_KEYS:
        level = shown
        for section in sections:
            level[section] = dict(level[section])
            level = level[section]
        if level.get(key):
            level[key] = HIDDEN
    return shown


def shows_text(config: Mapping[str, Any]) -> bool:
    """Return whether trackers may show the texts of a run.

    Args:
        config: Nested plain values. Those of a run from before the key existed have no `text`.
    """
    return bool(config["tracker"].get("text", True))
