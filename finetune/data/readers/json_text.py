"""Parse JSON text strictly: what has no single meaning, or is no text, is refused."""

import json
from typing import Any

MAX_DEPTH = 100
"""Levels of lists and objects in one another; deeper ones can't be written as JSON again."""


class JsonContentError(Exception):
    """Text that is whole JSON but can't be used; the message is the end of a sentence."""


def parse_json(text: str) -> Any:
    """Return the value of JSON text.

    Raises:
        json.JSONDecodeError: The text is no JSON.
        JsonContentError: An object has a key twice, a text is half a surrogate pair, the value is
            nested too deeply, or a number has too many digits.
    """
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise JsonContentError(f"is nested more than {MAX_DEPTH} levels deep") from None
    except (
        ValueError
    ):  # Python converts no longer numbers, as that takes quadratic time
        raise JsonContentError("has a number of more than 4300 digits") from None
    _require_usable(value, text)
    return value


def _require_usable(value: Any, text: str) -> None:
    """Refuse a value that is nested too deeply, or that holds half a surrogate pair.

    Args:
        value: What `text` was parsed to.
        text: The JSON; most texts are too plain to hold either.
    """
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
        raise JsonContentError(f"is nested more than {MAX_DEPTH} levels deep")
    # JSON can escape half a pair (U+D800 to U+DFFF), but no tokenizer takes it.
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise JsonContentError(
                "has half a surrogate pair, which is no text"
            ) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its pairs; twice the same key is refused, as one of both would be lost."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise JsonContentError(f"has the key '{repeated}' twice in one object")
    return content


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _is_deep(value: Any) -> bool:
    """Whether a value is nested more than `MAX_DEPTH` levels deep."""
    level = [value]
    for _ in range(MAX_DEPTH):
        containers = [item for item in level if isinstance(item, (dict, list))]
        level = [
            child
            for item in containers
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return any(isinstance(item, (dict, list)) for item in level)
