"""Plain values as JSON can hold them."""

import math
from typing import Any


def json_safe(content: Any) -> Any:
    """Convert nested plain values to what JSON can hold.

    Keys become text, tuples become lists, NaN and infinities become None.
    """
    if isinstance(content, dict):
        return {str(key): json_safe(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [json_safe(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content
