"""Score answers by metrics: every result is checked, and summed by row and by source."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.config.sections.evaluation import LOSS_METRICS
from finetune.console import summary_line
from finetune.errors import ConfigError
from finetune.metrics.metric import Answer, Metric, Score
from finetune.metrics.reasoning import without_reasoning

log = logging.getLogger(__name__)

Values = float | list[float | None]
"""One number for all answers, or a score of each."""


@dataclass(frozen=True)
class Result:
    """The scores of a metric under one name."""

    metric: Metric
    values: Values


def score_answers(
    metrics: Sequence[Metric], answers: Sequence[Answer], predictions: Sequence[str]
) -> dict[str, Result]:
    """Score predictions by each metric; think blocks are left out first.

    Args:
        metrics: The metrics.
        answers: What was to be generated.
        predictions: What was generated, in the same order.

    Returns:
        The results by name.

    Raises:
        ConfigError: A metric raised an error, or returned what is no score. It names the row.
    """
    stripped = [without_reasoning(text) for text in predictions]
    results: dict[str, Result] = {}
    for metric in metrics:
        returned = _call(metric, stripped, answers)
        named = returned if isinstance(returned, Mapping) else {None: returned}
        for key, values in named.items():
            name = metric.names[0] if key is None else str(key)
            if name in LOSS_METRICS or name in results or "/" in name or not name:
                raise ConfigError(f"{metric.path}: returned the name {name!r}: taken")
            results[name] = Result(metric, _checked(metric, values, answers))
    return results


def scores_by_source(
    results: Mapping[str, Result],
    answers: Sequence[Answer],
    predictions: Sequence[str],
    sources: Mapping[str, str],
) -> dict[str, Score]:
    """Return each result as a score, and where there are several sources also as `SOURCE/NAME`.

    Args:
        results: From `score_answers`.
        answers: What was to be generated.
        predictions: What was generated.
        sources: The name of each row's source, by the row's file; empty with a single one.
    """
    scores = _scores(results, answers)
    if not sources:
        return scores
    for source in dict.fromkeys(sources.values()):
        chosen = [
            index
            for index, answer in enumerate(answers)
            if sources.get(answer.row.source) == source
        ]
        if not chosen:
            continue
        of_source = _results_of(results, answers, predictions, chosen)
        source_answers = [answers[index] for index in chosen]
        for name, score in _scores(of_source, source_answers).items():
            scores[f"{source}/{name}"] = score
    return scores


def _results_of(
    results: Mapping[str, Result],
    answers: Sequence[Answer],
    predictions: Sequence[str],
    chosen: Sequence[int],
) -> dict[str, Result]:
    """The results of some answers: a single number of all says nothing of them, so it is asked."""
    numbers = [
        result.metric
        for result in results.values()
        if not isinstance(result.values, list)
    ]
    metrics = list({metric.path: metric for metric in numbers}.values())
    asked = score_answers(
        metrics,
        [answers[index] for index in chosen],
        [predictions[index] for index in chosen],
    )
    chosen_results = {}
    for name, result in results.items():
        if isinstance(result.values, list):
            values: Values = [result.values[index] for index in chosen]
            chosen_results[name] = Result(result.metric, values)
        elif name in asked:
            chosen_results[name] = asked[name]
    return chosen_results


def _scores(
    results: Mapping[str, Result], answers: Sequence[Answer]
) -> dict[str, Score]:
    scores = {}
    for name, result in results.items():
        if not isinstance(result.values, list):
            scores[name] = Score(result.values, result.metric.higher_is_better)
            continue
        score = _mean(result, answers)
        if score is None:
            log.warning("%s: no row was scored", name)
        else:
            scores[name] = score
    return scores


def _mean(result: Result, answers: Sequence[Answer]) -> Score | None:
    """The mean of scores, with sums and counts by row; None where nothing was scored."""
    assert isinstance(result.values, list)
    sums = {answer.position: 0.0 for answer in answers}
    counts = dict.fromkeys(sums, 0)
    for answer, value in zip(answers, result.values, strict=True):
        if value is not None:
            sums[answer.position] += value
            counts[answer.position] += 1
    total = sum(counts.values())
    if not total:
        return None
    value = math.fsum(sums.values()) / total
    higher_is_better = result.metric.higher_is_better
    return Score(value, higher_is_better, tuple(sums.values()), tuple(counts.values()))


def _call(metric: Metric, predictions: Sequence[str], answers: Sequence[Answer]) -> Any:
    """Call a metric's function.

    Raises:
        ConfigError: It raised an error; the message names the first row that causes it alone.
    """
    try:
        return _call_once(metric, predictions, answers)
    except Exception as error:
        index = _failing_answer(metric, predictions, answers)
        place = "" if index is None else f"{answers[index].row.place}: "
        reason = f"{type(error).__name__}: {summary_line(error)}"
        raise ConfigError(f"{metric.path}: {place}{reason}") from error


def _call_once(
    metric: Metric, predictions: Sequence[str], answers: Sequence[Answer]
) -> Any:
    references = [answer.reference for answer in answers]
    rows = [answer.row for answer in answers]
    return metric.score(list(predictions), references, rows)


def _failing_answer(
    metric: Metric, predictions: Sequence[str], answers: Sequence[Answer]
) -> int | None:
    """The answer that makes a metric raise, searched by halves; None if no single one does."""
    first, end = 0, len(answers)
    while end - first > 1:
        middle = (first + end) // 2
        if _raises(metric, predictions[first:middle], answers[first:middle]):
            end = middle
        else:
            first = middle
    is_cause = _raises(metric, predictions[first:end], answers[first:end])
    return first if is_cause else None


def _raises(
    metric: Metric, predictions: Sequence[str], answers: Sequence[Answer]
) -> bool:
    try:
        _call_once(metric, predictions, answers)
    except Exception:
        return True
    return False


def _checked(metric: Metric, values: Any, answers: Sequence[Answer]) -> Values:
    """Return what a metric returned as plain numbers, or refuse it."""
    if hasattr(values, "tolist"):
        # An array of NumPy, a column of pandas, a tensor.
        values = values.tolist()
    if not isinstance(values, list | tuple):
        return _number(metric, values, "one number for all rows")
    if len(values) != len(answers):
        counts = f"{len(values)} scores for {len(answers)} answers"
        raise ConfigError(f"{metric.path}: returned {counts}")
    numbers: list[float | None] = []
    for answer, value in zip(answers, values, strict=True):
        is_scored = value is not None
        number = _number(metric, value, answer.row.place) if is_scored else None
        numbers.append(number)
    return numbers


def _number(metric: Metric, value: Any, place: str) -> float:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    allowed = "must be a number, or None where a row is not scored"
    raise ConfigError(f"{metric.path}: {place}: returned {value!r}: {allowed}")
