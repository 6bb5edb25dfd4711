"""The metrics that a config names, and the direction in which each of its objectives is better."""

from collections.abc import Sequence

from finetune.config.schema import RunConfig
from finetune.config.sections.evaluation import (
    BITS_PER_BYTE,
    LOSS_METRICS,
    EvaluationSettings,
    is_task,
)
from finetune.errors import did_you_mean, refusal
from finetune.metrics import (
    classification,
    exact_match,
    json_valid,
    rouge,
    tool_calls,
)
from finetune.metrics.harness import Benchmark, load_benchmark, load_task_metrics
from finetune.metrics.metric import Metric
from finetune.metrics.user_function import load_function

_METRICS = {
    metric.path: metric
    for metric in (
        exact_match.METRIC,
        rouge.METRIC,
        json_valid.METRIC,
        tool_calls.METRIC,
        classification.METRIC,
    )
}


def load_metrics(settings: EvaluationSettings) -> list[Metric]:
    """Return the metrics of `evaluation.metrics`; functions are imported.

    Raises:
        ConfigError: A function or a package is missing, or two scores have one name.
    """
    metrics: list[Metric] = []
    for path in settings.metrics:
        if path == "rouge":
            rouge.require_rouge()
        if is_task(path):
            metrics += load_task_metrics(path, settings)
        else:
            metrics.append(_METRICS.get(path) or load_function(path, settings))
    names = [*LOSS_METRICS, BITS_PER_BYTE]
    for metric in metrics:
        for name in metric.names:
            if name in names:
                reason = f"eval/{name} would have two meanings; rename it"
                raise refusal("evaluation.metrics", metric.path, reason)
            names.append(name)
    return metrics


def load_benchmarks(settings: EvaluationSettings) -> list[Benchmark]:
    """Return the tasks of lm-evaluation-harness among `evaluation.metrics`.

    Raises:
        ConfigError: The package is missing, or a task can't be used.
    """
    return [
        load_benchmark(path, settings.harness_path)
        for path in settings.metrics
        if is_task(path)
    ]


def generates_answers(settings: EvaluationSettings) -> bool:
    """Whether a metric, or a task of lm-evaluation-harness, needs generated answers."""
    benchmarks = load_benchmarks(settings)
    return settings.generates or any(benchmark.generates for benchmark in benchmarks)


def check_metrics(config: RunConfig) -> list[Metric]:
    """Return a config's metrics, once its functions have the scores that the objective needs.

    Raises:
        ConfigError: A metric can't be loaded, or gives no such score.
    """
    metrics = load_metrics(config.evaluation)
    names = [name for metric in metrics for name in metric.names]
    allowed = config.allowed_objectives(names)
    for objective in config.objectives:
        if objective not in allowed:
            reason = did_you_mean(objective, allowed)
            if config.evaluation.has_functions:
                reason += "; a function's further scores stand in its attribute names"
            raise refusal("objective", objective, reason)
    return metrics


def higher_is_better(objective: str, metrics: Sequence[Metric]) -> bool:
    """Return whether an objective is better the larger it is.

    Args:
        objective: As `eval/loss`, `eval/NAME`, `eval/SOURCE/NAME`, `eval/harness/TASK`,
            `train/seconds`.
        metrics: The metrics of the config.
    """
    split, _, name = objective.partition("/")
    if split != "eval":
        return False
    if not is_task(name):
        name = name.rpartition("/")[2]
    for metric in metrics:
        if name in metric.names:
            return metric.higher_is_better
    return name == "accuracy"
