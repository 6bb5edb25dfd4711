"""Plain values as typed dataclasses, or a refusal of one line that names the key, the value and what is allowed."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from finetune.errors import ConfigError, did_you_mean, refusal

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


T = TypeVar("T", bound="DataclassInstance")


def build(cls: type[T], path: str, values: Any) -> T:
    """A settings dataclass from plain values: each key known, and given or with a default; each value of its type."""
    if not isinstance(values, Mapping):
        raise refusal(path, values, "must be a group of keys")
    hints = typing.get_type_hints(cls)
    fields = [field.name for field in dataclasses.fields(cls)]
    prefix = f"{path}." if path else ""
    for key in values:
        if key not in fields:
            raise ConfigError(f"{prefix}{key}: no such key; {did_you_mean(str(key), fields)}")
    for field in dataclasses.fields(cls):
        if field.name not in values and field.default is dataclasses.MISSING:
            raise ConfigError(f"{prefix}{field.name}: must be given")
    return cls(**{name: _convert(hints[name], f"{prefix}{name}", values[name]) for name in fields if name in values})


def _convert(hint: Any, path: str, value: Any) -> Any:
    """A plain value as the type that the hint names, or a refusal that says what is allowed."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, path, value)
    for option in _options(hint):
        matches, converted = _try(option, value)
        if matches:
            return converted
    words = [choice for option in _options(hint) for choice in _choices(option)]
    if words and isinstance(value, str):
        raise refusal(path, value, did_you_mean(value, words))
    raise refusal(path, value, "must be " + " or ".join(_describe(option) for option in _options(hint)))


def _options(hint: Any) -> tuple[Any, ...]:
    return (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )


def _choices(option: Any) -> tuple[str, ...]:
    return typing.get_args(option) if typing.get_origin(option) is Literal else ()


def _try(option: Any, value: Any) -> tuple[bool, Any]:
    """Whether a value is of one plain type, and the value as that type."""
    origin = typing.get_origin(option)
    if origin is Literal:
        return value in typing.get_args(option) and isinstance(value, str), value
    if origin is list:
        if not isinstance(value, list):
            return False, None
        items = [_try(typing.get_args(option)[0], item) for item in value]
        return all(matches for matches, _ in items), [item for _, item in items]
    if origin is dict:
        return isinstance(value, Mapping), value
    if option is float:  # a whole number will do; nan and inf never
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and math.isfinite(value), float(value) if number else None
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if option is str and isinstance(value, int) and not isinstance(value, bool):
        return True, str(value)  # name=2026
    if option is types.NoneType:
        return value is None, None
    return isinstance(value, option), value


def _describe(option: Any) -> str:
    origin = typing.get_origin(option)
    if origin is Literal:
        return f"one of {', '.join(typing.get_args(option))}"
    if origin is list:
        return f"a list, each item {_describe(typing.get_args(option)[0])}"
    if origin is dict:
        return "a group of keys"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}[
        option
    ]
