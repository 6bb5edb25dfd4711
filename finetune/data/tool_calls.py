"""Tool calls and tool schemas in the common form, from the ways in which data sets write them."""

import contextlib
import json
from typing import Any

from finetune.data.readers import json_text
from finetune.errors import ConfigError


def normalize_tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Return calls as `{"type": "function", "id"?, "function": {"name", "arguments"}}`.

    Args:
        value: A call or a list of calls, perhaps as JSON text; each with or without the key
            `function` around its name and arguments. `parameters` is another word for `arguments`.
        where: The message, to begin error messages with.

    Raises:
        ConfigError: A call has no name, its arguments are no object, or it has a key that no chat
            template knows.
    """
    calls = _as_list(value, f"{where}: tool_calls")
    return [
        _tool_call(call, f"{where}, tool call {n}")
        for n, call in enumerate(calls, start=1)
    ]


def normalize_tools(value: Any, where: str) -> list[dict[str, Any]]:
    """Return tool schemas as `{"type": "function", "function": {"name", …}}`.

    Args:
        value: A list of schemas, perhaps as JSON text, each perhaps as JSON text of its own, with
            or without the key `function` around the rest.
        where: The row and the column, to begin error messages with.

    Raises:
        ConfigError: A schema has no name or describes no function.
    """
    tools = _as_list(value, where)
    return [_tool(tool, f"{where}: tool {n}") for n, tool in enumerate(tools, start=1)]


def parse_json(text: str, where: str) -> Any:
    """Return the value of JSON text. Raises ConfigError if it is none, or has no single meaning."""
    try:
        return json_text.parse_json(text)
    except json.JSONDecodeError as error:
        reason = f" must be JSON, but is {_shorten(text)} ({error.msg})"
    except json_text.JsonContentError as error:
        reason = f": its JSON text {error}"
    raise ConfigError(f"{where}{reason}")


def parse_list(value: Any) -> Any:
    """Return the list that JSON text holds; any other value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    call = without_nulls(_parse_text(call, where))
    if not isinstance(call, dict):
        raise ConfigError(f"{where} must be an object with a name and arguments")
    _require_function(call, where)
    function = _parse_text(call.get("function", call), where)
    if not isinstance(function, dict):
        raise ConfigError(
            f"{where}: function must be an object with a name and arguments"
        )
    call_keys = {"type", "id", "index"}
    function_keys = {"name", "arguments", "parameters"}
    keys = [*call, *function] if "function" in call else list(call)
    unknown = sorted(set(keys) - call_keys - function_keys - {"function"})
    if unknown:
        allowed = "type, id, function (name, arguments)"
        raise ConfigError(f"{where} has {', '.join(unknown)}; allowed: {allowed}")
    if "arguments" in function and "parameters" in function:
        raise ConfigError(f"{where} has arguments and parameters; allowed: one of them")
    normalized: dict[str, Any] = {"type": "function"}
    if "id" in call:
        normalized["id"] = call["id"]
    arguments = function.get("arguments", function.get("parameters"))
    name = _require_name(function, where)
    normalized["function"] = {"name": name, "arguments": _arguments(arguments, where)}
    return normalized


def _arguments(value: Any, where: str) -> dict[str, Any]:
    """The arguments of a call as an object, because templates write them as JSON."""
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        value = parse_json(value, f"{where}: arguments")
    if not isinstance(value, dict):
        reason = (
            f"must be an object, or one as JSON text, but are {type(value).__name__}"
        )
        raise ConfigError(f"{where}: arguments {reason}")
    return value


def _tool(tool: Any, where: str) -> dict[str, Any]:
    tool = without_nulls(_parse_text(tool, where))
    if not isinstance(tool, dict):
        raise ConfigError(f"{where} must be an object with a name and parameters")
    _require_function(tool, where)
    if "function" in tool:
        function = tool["function"]
        if not isinstance(function, dict):
            raise ConfigError(
                f"{where}: function must be an object with a name and parameters"
            )
        _require_name(function, where)
        return {**tool, "type": "function"}
    _require_name(tool, where)
    function = {key: value for key, value in tool.items() if key != "type"}
    return {"type": "function", "function": function}


def _require_function(value: dict[str, Any], where: str) -> None:
    kind = value.get("type", "function")
    if kind != "function":
        raise ConfigError(f"{where} is of type {kind}; allowed: function")


def _require_name(function: dict[str, Any], where: str) -> str:
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"{where} has no name; its keys: {', '.join(function) or 'none'}"
        )
    return name


def _as_list(value: Any, where: str) -> list[Any]:
    value = _parse_text(value, where)
    if isinstance(value, dict):
        return [value]
    if not isinstance(value, list):
        reason = f"must be a list, or one as JSON text, but is {type(value).__name__}"
        raise ConfigError(f"{where} {reason}")
    return value


def _parse_text(value: Any, where: str) -> Any:
    return parse_json(value, where) if isinstance(value, str) else value


def without_nulls(value: Any) -> Any:
    """Return plain values without the keys that hold null.

    Columnar files give every object the keys of all others, with null where a row has none. Items
    of lists stay.
    """
    if isinstance(value, dict):
        return {
            key: without_nulls(item) for key, item in value.items() if item is not None
        }
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _shorten(text: str) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text.split())
    return repr(line if len(line) <= 60 else f"{line[:60]}…")
