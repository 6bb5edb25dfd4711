"""Functions that ask a judge: called by several threads, again after an error, and cached on disk.

A call that fails to the end is no score, and is counted; it never fails the run.
"""

import contextlib
import importlib
import inspect
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from finetune.config.sections.evaluation import EvaluationSettings
from finetune.console import summary_line
from finetune.data.types import Row, fingerprint
from finetune.files.atomic import read_json, write_json
from finetune.files.cache import cache_folder

log = logging.getLogger(__name__)

FIRST_WAIT_SECONDS = 1.0
"""Wait before the second call of a row; each further wait is twice as long."""


class _FailedCall:
    """In place of the score of a call that failed to the end."""

    def __init__(self, error: Exception) -> None:
        self.reason = f"{type(error).__name__}: {summary_line(error)}"


def ask_judge(
    function: Callable[[str, str, Row], Any],
    path: str,
    settings: EvaluationSettings,
    predictions: Sequence[str],
    references: Sequence[str],
    rows: Sequence[Row],
) -> list[Any]:
    """Call a function for each answer, and return its scores.

    Args:
        function: Scores one answer; an exception is a failed call.
        path: The function's import path.
        settings: `concurrency` and `retries`.
        predictions: The generated answers.
        references: The answers as the rows have them.
        rows: The row of each answer.

    Returns:
        A score for each answer; None where the function returned it, or every call failed.
    """
    folder = cache_folder() / "judge" / fingerprint([path, _source(function)])

    def ask(prediction: str, reference: str, row: Row) -> Any:
        file = folder / f"{fingerprint([row, reference, prediction])}.json"
        return _cached(
            file, lambda: function(prediction, reference, row), settings.retries
        )

    with ThreadPoolExecutor(settings.concurrency) as threads:
        scores = list(threads.map(ask, predictions, references, rows))
    failed = [score for score in scores if isinstance(score, _FailedCall)]
    if failed:
        log.warning(
            "%s: %d of %d calls failed, their rows are not scored; the first: %s",
            path,
            len(failed),
            len(scores),
            failed[0].reason,
        )
    return [None if isinstance(score, _FailedCall) else score for score in scores]


def _cached(file: Path, call: Callable[[], Any], retries: int) -> Any:
    """Return the score in a file, or call for it and write it there."""
    with contextlib.suppress(Exception):
        entry = read_json(file)
        if entry is not None:
            return entry["score"]
    score = _call_with_retries(call, retries)
    if score is None or type(score) in (bool, int, float):
        # A full disk must not cost the score.
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {"score": score})
    return score


def _call_with_retries(call: Callable[[], Any], retries: int) -> Any:
    wait = FIRST_WAIT_SECONDS
    for attempt in range(retries + 1):
        try:
            return call()
        except Exception as error:
            if attempt == retries:
                return _FailedCall(error)
        time.sleep(wait)
        wait *= 2
    raise AssertionError("the last attempt returns")


def _source(function: Callable[..., Any]) -> str:
    """The text of a function's module: with another prompt, a judge gives other scores."""
    module = importlib.import_module(function.__module__)
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):
        return ""
