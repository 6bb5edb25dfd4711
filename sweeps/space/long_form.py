"""Variants and conditions as a YAML file has them, as Hydra's sweep syntax with tags.

size: {variants: {small: {lora.r: 8, lora.alpha: 16}, large: [lora.r=64, lora.alpha=128]}}
optimizer.warmup_ratio: {search: "interval(0, 0.1)", when: [optimizer.lr_scheduler_type=cosine]}
"""

import re
from collections.abc import Mapping
from typing import Any

from finetune.errors import ConfigError
from sweeps.space.encoding import encode
from sweeps.space.parameters import VARIANTS

ENTRIES = ("search", "variants", "when")


def is_long_form(value: Any) -> bool:
    """Whether a parameter's value is a long form, and no value of a config key."""
    if not isinstance(value, Mapping):
        return False
    return "variants" in value or {"search", "when"} <= value.keys()


def tagged_sweep(name: str, value: Mapping[str, Any]) -> str:
    """Return the sweep syntax of a long form, whose `search` is sweep syntax already.

    Args:
        name: the parameter, for the error.
        value: its long form.

    Raises:
        ConfigError: an entry has another form.
    """
    has_one = ("search" in value) != ("variants" in value)
    if not has_one or not value.keys() <= set(ENTRIES):
        entries = ", ".join(map(str, value))
        raise ConfigError(
            f"{name}: has {entries}; write {{variants: {{NAME: {{key: value}}}}}}, "
            "or {search: interval(0, 1), when: {key: value}}"
        )
    tags = [encode(condition) for condition in _conditions(name, value.get("when", []))]
    if "variants" in value:
        tags.append(VARIANTS)
        return f"tag({','.join(tags)},choice({encode(value['variants'])}))"
    sweep = str(value["search"]).strip()
    # Of a tag in a tag, Hydra keeps the outer one's.
    inner = re.fullmatch(r"tag\s*\((.*)\)", sweep, re.DOTALL)
    if inner:
        sweep = inner[1]
    elif not re.match(r"\w+\s*\(", sweep):
        sweep = f"choice({sweep})"
    return f"tag({','.join([*tags, sweep])})"


def _conditions(name: str, when: Any) -> list[str]:
    """Return conditions as overrides: `key=value`, or `key=value,value` for one of several."""
    if isinstance(when, Mapping):
        conditions = []
        for key, value in when.items():
            values = value if isinstance(value, list) else [value]
            conditions.append(f"{key}={','.join(str(encode(each)) for each in values)}")
        return conditions
    conditions = [when] if isinstance(when, str) else when
    is_list = isinstance(conditions, list)
    if not is_list or not all("=" in str(condition) for condition in conditions):
        raise ConfigError(f"{name}: when={when}: write {{key: value}}, or [key=value]")
    return [str(condition) for condition in conditions]
