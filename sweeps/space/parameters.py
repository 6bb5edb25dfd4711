"""One parameter of a sweep, from its override; its tags say more of it.

`size=tag(variants,choice({small: {lora.r: 8, lora.alpha: 16}, large: {lora: r64}}))` searches
among sets of values, `lora.dropout=tag('lora.r=64,128',interval(0,0.1))` only with these values of
`lora.r`. For `tag(relative, …)` see `sweeps.space.overrides`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, Override, Sweep
from optuna.distributions import BaseDistribution, CategoricalDistribution

from finetune.config.flatten import flatten
from finetune.errors import ConfigError
from sweeps.space.distributions import distribution_or_value
from sweeps.space.encoding import encode
from sweeps.space.overrides import is_relative, parse_overrides, refuse_quoted_list

VARIANTS = "variants"
"""The tag of a choice of variants."""

Variants = dict[Any, dict[str, Any]]
"""Encoded values of config keys, by the encoded name of their variant."""

Condition = dict[str, list[Any]]
"""The encoded values that other parameters may have, by their names."""


@dataclass(frozen=True)
class Parameter:
    """A parameter, searched or with one value."""

    name: str
    """The config key, with `+` where the user wrote one; of variants a name of the user's."""
    searched: BaseDistribution | Any
    """What is searched, or the text of the one value."""
    is_relative: bool = False
    variants: Variants = field(default_factory=dict)
    when: Condition = field(default_factory=dict)


def read_parameter(override: Override) -> Parameter:
    """Read a parameter from an override that deletes nothing.

    Raises:
        ConfigError: the override is no valid search space.
    """
    name = override.get_key_element()
    sweep = override.value()
    tags = sweep.tags if isinstance(sweep, Sweep) else set()
    # Sorted, because a set has another order in each process.
    when = _condition(name, sorted(tag for tag in tags if "=" in tag))
    if VARIANTS in tags:
        variants = _variants(override)
        choices = CategoricalDistribution(list(variants))
        return Parameter(name, choices, variants=variants, when=when)
    searched = distribution_or_value(override)
    values = [searched]
    if isinstance(searched, CategoricalDistribution):
        values = list(searched.choices)
    refuse_quoted_list(override, values)
    return Parameter(name, searched, is_relative(override), when=when)


def _variants(override: Override) -> Variants:
    name = override.get_key_element()
    sweep = override.value()
    elements = sweep.list if isinstance(sweep, ChoiceSweep) else []
    if len(elements) != 1 or not isinstance(elements[0], Mapping) or not elements[0]:
        raise ConfigError(
            f"{override.input_line}: variants are a choice of one mapping, as {name}="
            "tag(variants,choice({small: {lora.r: 8, lora.alpha: 16}, large: {lora.r: 64}}))"
        )
    variants: Variants = {}
    for variant, values in elements[0].items():
        variants[encode(variant)] = {
            key: encode(value) for key, value in _values(name, values).items()
        }
    return variants


def _values(name: str, written: Any) -> dict[str, Any]:
    """Return values by their keys, from a mapping or from overrides as `lora.r=8`."""
    if isinstance(written, Mapping):
        return flatten(dict(written))
    if not isinstance(written, list):
        raise ConfigError(f"{name}: {written}: write {{lora.r: 8}} or [lora.r=8]")
    texts = [getattr(text, "text", str(text)) for text in written]
    values: dict[str, Any] = {}
    for override in parse_overrides({}, texts):
        if override.is_delete() or override.is_sweep_override():
            raise ConfigError(f"{name}: {override.input_line}: must be one value")
        values[override.get_key_element()] = override.value()
    return values


def _condition(name: str, texts: list[str]) -> Condition:
    """Read overrides with the value that each key must have, or with several allowed ones."""
    condition: Condition = {}
    for override in parse_overrides({}, texts):
        value = override.value()
        allowed = value.list if isinstance(value, ChoiceSweep) else [value]
        is_range = isinstance(value, Sweep) and not isinstance(value, ChoiceSweep)
        if override.is_delete() or is_range:
            raise ConfigError(f"{name}: {override.input_line}: must have values")
        condition[override.get_key_element()] = [encode(each) for each in allowed]
    return condition
