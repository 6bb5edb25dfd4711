"""Tasks of lm-evaluation-harness as metrics, and groups of tasks.

`lm_eval` is imported only where a config names a task: `evaluation.metrics=[harness/TASK]`.
"""

import difflib
import functools
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.compat import harness_filters
from finetune.config.sections.evaluation import HARNESS, EvaluationSettings
from finetune.console import summary_line
from finetune.data.types import Row
from finetune.errors import refusal
from finetune.metrics.harness_generation import AnswerSettings, read_settings
from finetune.metrics.metric import Metric

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

KEY = "evaluation.metrics"

GENERATED = "generate_until"
"""The kind of tasks that generate."""

KINDS = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", GENERATED)

MOST_NAMES = 6
"""Tasks that a message names."""


@dataclass(frozen=True)
class Benchmark:
    """A task of lm-evaluation-harness, or a group of tasks with one value."""

    path: str
    """As `evaluation.metrics` names it, `harness/NAME`."""
    tasks: Mapping[str, "Task"]
    groups: Mapping[str, "Group"]
    """The group and those inside of it; empty for a task."""

    @property
    def name(self) -> str:
        """As lm-evaluation-harness names it."""
        return self.path.removeprefix(HARNESS)

    @property
    def generates(self) -> bool:
        """Whether any task generates answers."""
        return bool(self.answer_settings)

    @property
    def answer_settings(self) -> list[AnswerSettings]:
        """How the answers of each task that generates are generated."""
        return [
            read_settings(self.path, task.config.generation_kwargs or {})
            for task in self.tasks.values()
            if task.OUTPUT_TYPE == GENERATED
        ]


def load_task_metrics(path: str, settings: EvaluationSettings) -> list[Metric]:
    """Return the metrics of a task or a group of tasks, the first one as `harness/NAME`.

    Further ones are `harness/NAME/METRIC`, and `harness/NAME/METRIC/FILTER` where answers are
    filtered in several ways.

    Args:
        path: As `evaluation.metrics` names it, `harness/NAME`.
        settings: Where tasks of the user's are.

    Raises:
        ConfigError: The package is missing, there is no such task, or it can't be used.
    """
    benchmark = load_benchmark(path, settings.harness_path)
    metrics: list[Metric] = []
    names: set[str] = set()
    for name, filter_name, rises in _scores(benchmark):
        score_name = path
        if metrics:
            score_name += f"/{name}"
        if name in names:
            score_name += f"/{filter_name}"
        names.add(name)
        key = f"{name},{filter_name}"
        metrics.append(Metric(path, (score_name,), _no_answers, rises, False, key))
    if not metrics:
        raise refusal(KEY, path, "has no metric")
    return metrics


@functools.cache
def load_benchmark(path: str, folder: str | None) -> Benchmark:
    """Load a task or a group of tasks with its documents, once in a process.

    Args:
        path: As `evaluation.metrics` names it, `harness/NAME`.
        folder: Has tasks of the user's; None: there are none.

    Raises:
        ConfigError: See `load_task_metrics`.
    """
    if importlib.util.find_spec("lm_eval") is None:
        reason = 'needs the package lm-eval: pip install "qlora-sweeps[harness]"'
        raise refusal(KEY, path, reason)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if folder is not None and not Path(folder).is_dir():
        raise refusal("evaluation.harness_path", folder, "there is no such folder")
    name = path.removeprefix(HARNESS)
    manager = _manager_of(name, folder)
    _require_value(path, name, manager)
    try:
        loaded = manager.load(name)
    except Exception as error:
        raise refusal(KEY, path, f"can't be loaded: {summary_line(error)}") from error
    benchmark = Benchmark(path, loaded["tasks"], loaded["groups"])
    for task_name, task in benchmark.tasks.items():
        unusable = _unusable(task)
        if unusable is not None:
            where = "" if task_name == name else f"its task {task_name} "
            raise refusal(KEY, path, f"{where}{unusable}")
    # Settings that can't be used are refused here.
    _ = benchmark.answer_settings
    return benchmark


def _manager_of(name: str, folder: str | None) -> Any:
    """Return what loads a task or a group: the user's folder alone, if it has all of it.

    To read lm-evaluation-harness's many files takes some seconds.
    """
    if folder is not None:
        of_folder = _task_manager(folder, has_defaults=False)
        names = [name]
        if name in of_folder.all_groups:
            names = _members(of_folder, name)
        if set(names) <= set(of_folder.all_subtasks):
            return of_folder
    return _task_manager(folder, has_defaults=True)


@functools.cache
def _task_manager(folder: str | None, has_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=has_defaults)


def _members(manager: Any, group: str) -> list[str]:
    """Return the names of a group's tasks and groups."""
    members = manager.task_index[group].cfg.get("task") or []
    members = [members] if isinstance(members, str) else members
    return [
        member
        if isinstance(member, str)
        else str(member.get("task", member.get("group")))
        for member in members
    ]


def _require_value(path: str, name: str, manager: Any) -> None:
    """Refuse a name that is neither a task nor a group of tasks with one value."""
    if name in manager.all_subtasks:
        return
    listed = "lm-eval ls subtasks lists all tasks"
    if name in manager.all_tags:
        tasks = sorted(manager.task_index[name].tags)
        reason = (
            f"is a tag of {len(tasks)} tasks, which has no value; name some of them"
        )
        raise refusal(KEY, path, f"{reason}: {_first(tasks)} ({listed})")
    if name in manager.all_groups:
        if manager.task_index[name].cfg.get("aggregate_metric_list"):
            return
        names = _members(manager, name)
        reason = (
            f"is a group of {len(names)} tasks, for which lm-evaluation-harness defines no value "
            "(aggregate_metric_list); name some of them"
        )
        raise refusal(KEY, path, f"{reason}: {_first(names)} ({listed})")
    close = difflib.get_close_matches(name, manager.all_tasks, n=3)
    guess = f"; did you mean {', '.join(close)}?" if close else ""
    reason = f"lm-evaluation-harness has no such task{guess}"
    raise refusal(KEY, path, f"{reason} ({listed})")


def _first(names: Sequence[str]) -> str:
    """Return the first names, as `evaluation.metrics` takes them."""
    shown = [f"{HARNESS}{name}" for name in names[:MOST_NAMES]]
    return ", ".join([*shown, "…"] if len(names) > MOST_NAMES else shown)


def _unusable(task: "Task") -> str | None:
    """Return why a task can't be used; None: it can."""
    if task.OUTPUT_TYPE not in KINDS:
        return f"is a task of {task.OUTPUT_TYPE}; allowed: {', '.join(KINDS)}"
    if getattr(task, "UNSAFE_CODE", False):
        return "runs the code that a model has generated, which is not supported"
    if getattr(task, "MULTIMODAL", False):
        return "has images or sound, which are not supported"
    if len(task.eval_docs) < 2:
        return "must have at least two documents"
    return None


def _scores(benchmark: Benchmark) -> list[tuple[str, str, bool]]:
    """Return the metric, the filter and the direction of each value, the main one first."""
    group = benchmark.groups.get(benchmark.name)
    if group is None:
        (task,) = benchmark.tasks.values()
        return [
            # None: the harness does not say.
            (name, filter_name, rises is not False)
            for filter_name in harness_filters(task)
            for name, rises in task.higher_is_better().items()
        ]
    scores = []
    for aggregate in group.aggregate_metric_list or []:
        name = aggregate.metric
        tasks = [
            task for task in benchmark.tasks.values() if name in task.higher_is_better()
        ]
        if not tasks:
            raise refusal(
                KEY, benchmark.path, f"none of its tasks has the metric {name}"
            )
        directions = {task.higher_is_better()[name] is not False for task in tasks}
        if len(directions) > 1:
            reason = f"its tasks do not agree whether more of {name} is better"
            raise refusal(KEY, benchmark.path, reason)
        # Each once, in the order of the tasks.
        filters = dict.fromkeys(
            filter_name for task in tasks for filter_name in harness_filters(task)
        )
        for filter_name in aggregate.filter_list or filters:
            if filter_name in filters:
                scores.append((name, filter_name, directions == {True}))
    return scores


def _no_answers(
    predictions: Sequence[str], references: Sequence[str], rows: Sequence[Row]
) -> Any:
    raise AssertionError("a task scores its own documents")
