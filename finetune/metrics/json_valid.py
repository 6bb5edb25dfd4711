"""Whether an answer is JSON, with nothing around it."""

import json
from collections.abc import Sequence
from typing import NoReturn

from finetune.data.types import Row
from finetune.metrics.metric import Metric


def _score(
    predictions: Sequence[str], references: Sequence[str], rows: Sequence[Row]
) -> list[float]:
    return [float(_is_json(prediction)) for prediction in predictions]


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_constant(name: str) -> NoReturn:
    """Refuse NaN and Infinity, which Python reads and JSON does not have."""
    raise ValueError(name)


METRIC = Metric("json_valid", ("json_valid",), _score)
