"""Tasks of lm-evaluation-harness as metrics, by the likelihoods of their documents' answers.

`lm_eval` is imported only where a config names a task: `evaluation.metrics=[harness/TASK]`.
"""

import difflib
import functools
import importlib.util
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetune.config.sections.evaluation import HARNESS, EvaluationSettings
from finetune.console import summary_line
from finetune.data.types import Row
from finetune.errors import refusal
from finetune.metrics.metric import Metric

if TYPE_CHECKING:
    from lm_eval.api.task import Task

KEY = "evaluation.metrics"

LIKELIHOODS = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")
"""The kinds of tasks that generate nothing."""


def load_task_metrics(path: str, settings: EvaluationSettings) -> list[Metric]:
    """Return the metrics of a task: the first one as `harness/TASK`, others as `harness/TASK/NAME`.

    Args:
        path: As `evaluation.metrics` names it, `harness/TASK`.
        settings: Where tasks of the user's are.

    Raises:
        ConfigError: The package is missing, there is no such task, or it can't be used.
    """
    task = load_task(path, settings.harness_path)
    metrics = []
    for number, (name, is_rising) in enumerate(task.higher_is_better().items()):
        score_name = path if number == 0 else f"{path}/{name}"
        # None: the harness does not say.
        rises = is_rising is not False
        metrics.append(Metric(path, (score_name,), _no_answers, rises, False, name))
    return metrics


@functools.cache
def load_task(path: str, folder: str | None) -> "Task":
    """Load a task and its documents, once in a process.

    Args:
        path: As `evaluation.metrics` names it, `harness/TASK`.
        folder: Has tasks of the user's; None: there are none.

    Raises:
        ConfigError: See `load_task_metrics`.
    """
    if importlib.util.find_spec("lm_eval") is None:
        reason = 'needs the package lm-eval: pip install "qlora-sweeps[harness]"'
        raise refusal(KEY, path, reason)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _task_manager(folder)
    name = path.removeprefix(HARNESS)
    if name not in manager.all_subtasks:
        raise refusal(KEY, path, _no_such_task(name, manager))
    try:
        task = manager.load(name)["tasks"][name]
    except Exception as error:
        raise refusal(KEY, path, f"can't be loaded: {summary_line(error)}") from error
    if task.OUTPUT_TYPE not in LIKELIHOODS:
        allowed = f"is a task of {task.OUTPUT_TYPE}; allowed: {', '.join(LIKELIHOODS)}"
        raise refusal(KEY, path, allowed)
    if len(task.eval_docs) < 2:
        raise refusal(KEY, path, "must have at least two documents")
    return task


@functools.cache
def _task_manager(folder: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


def _no_such_task(name: str, manager: Any) -> str:
    if name in manager.all_tasks:
        return "is a group of tasks: name one of them"
    close = difflib.get_close_matches(name, manager.all_subtasks, n=3)
    guess = f"; did you mean {', '.join(close)}?" if close else ""
    return f"lm-evaluation-harness has no such task{guess}"


def _no_answers(
    predictions: Sequence[str], references: Sequence[str], rows: Sequence[Row]
) -> Any:
    raise AssertionError("a task scores its own documents")
