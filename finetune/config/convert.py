"""Convert plain values to typed dataclasses.

A value that does not fit is refused in one line that names the key, the value and what is allowed.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from finetune.config.keys import unknown_key
from finetune.errors import ConfigError, did_you_mean, refusal

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


T = TypeVar("T", bound="DataclassInstance")


DESCRIPTIONS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    types.NoneType: "null",
}


class _MismatchError(Exception):
    """A value is not of a type."""


def build(cls: type[T], path: str, values: Any) -> T:
    """Build a settings dataclass from plain values.

    Args:
        cls: the dataclass; its annotations say which types are allowed.
        path: the dotted key of the values, empty at the top level.
        values: a mapping from field names to plain values.

    Raises:
        ConfigError: an unknown key, a missing key, or a value of a wrong type.
    """
    if not isinstance(values, Mapping):
        raise refusal(path, values, "must be a group of keys")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    prefix = f"{path}." if path else ""
    for key in values:
        if key not in fields:
            raise ConfigError(unknown_key(f"{prefix}{key}", fields))
    no_default = dataclasses.MISSING
    for name, field in fields.items():
        has_default = not (field.default is field.default_factory is no_default)
        if name not in values and not has_default:
            raise ConfigError(f"{prefix}{name}: must be given")
    hints = typing.get_type_hints(cls)
    converted: dict[str, Any] = {}
    for name in fields:
        if name in values:
            key = f"{prefix}{name}"
            converted[name] = _convert(hints[name], key, values[name])
    return cls(**converted)


def _convert(hint: Any, path: str, value: Any) -> Any:
    """Return a plain value as the annotated type, or refuse it."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, path, value)
    alternatives = _alternatives(hint)
    for alternative in alternatives:
        if dataclasses.is_dataclass(alternative):
            if isinstance(value, Mapping):
                return _convert(alternative, path, value)
            # Anything else may fit another alternative: a source is a text or a group of keys.
            continue
        item_hint = _item_with_keys(alternative)
        if item_hint is not None and isinstance(value, list):
            items = []
            for index, item in enumerate(value):
                items.append(_convert(item_hint, f"{path}[{index}]", item))
            return items
        try:
            return _convert_plain(alternative, value)
        except _MismatchError:
            continue
    choices: list[str] = []
    for alternative in alternatives:
        choices += _choices(alternative)
    if choices and isinstance(value, str):
        has_others = any(
            not _choices(alternative) and alternative is not types.NoneType
            for alternative in alternatives
        )
        description = describe_type(hint) if has_others else None
        raise refusal(path, value, did_you_mean(value, choices, description))
    raise refusal(path, value, f"must be {describe_type(hint)}")


def describe_type(hint: Any) -> str:
    """Return what an annotation of a field accepts, in words for the user."""
    return " or ".join(_describe(alternative) for alternative in _alternatives(hint))


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union; a single type for any other annotation."""
    # `int | None` is of the first kind, `Optional[int]` of the second.
    is_union = isinstance(hint, types.UnionType)
    if is_union or typing.get_origin(hint) is typing.Union:
        return typing.get_args(hint)
    return (hint,)


def _item_with_keys(hint: Any) -> Any:
    """Return the type of a list's items if an item may be a group of keys; None if not."""
    if typing.get_origin(hint) is not list:
        return None
    (item_hint,) = typing.get_args(hint)
    for alternative in _alternatives(item_hint):
        if dataclasses.is_dataclass(alternative):
            return item_hint
    return None


def _choices(hint: Any) -> tuple[str, ...]:
    """Return the words of a Literal; none for any other annotation."""
    if typing.get_origin(hint) is not Literal:
        return ()
    return typing.get_args(hint)


def _convert_plain(hint: Any, value: Any) -> Any:
    """Return a value as one type that is no dataclass and no union.

    Raises:
        _MismatchError: the value is not of the type.
    """
    origin = typing.get_origin(hint)
    if origin is list:
        return _convert_list(hint, value)
    is_whole = is_number(value) and isinstance(value, int)
    # YAML reads the 2026 of `name=2026` as a number.
    if hint is str and is_whole:
        return str(value)
    if hint is float and is_number(value) and math.isfinite(value):
        return float(value)
    if origin is Literal:
        matches = isinstance(value, str) and value in typing.get_args(hint)
    elif origin is dict:
        matches = isinstance(value, Mapping)
    elif hint is int:
        matches = is_whole
    else:
        matches = hint is not float and isinstance(value, hint)
    if not matches:
        raise _MismatchError
    return value


def is_number(value: Any) -> bool:
    """Whether a value is a number to a user: in Python, true and false are numbers as well."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _convert_list(hint: Any, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _MismatchError
    (item_hint,) = typing.get_args(hint)
    return [_convert_plain(item_hint, item) for item in value]


def _describe(hint: Any) -> str:
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin is Literal:
        if len(arguments) > 1:
            return f"one of {', '.join(arguments)}"
        return str(arguments[0])
    if origin is list:
        return f"a list, each item {describe_type(arguments[0])}"
    if origin is dict:
        return "a group of keys"
    if dataclasses.is_dataclass(hint):
        keys = [f"{field.name}: …" for field in dataclasses.fields(hint)]
        return f"{{{', '.join(keys)}}}"
    return DESCRIPTIONS[hint]
