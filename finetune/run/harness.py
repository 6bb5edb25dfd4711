"""Evaluate tasks of lm-evaluation-harness with a run's model, as it is in memory.

The harness runs in a thread; the run computes the likelihoods that it asks for, by the run's engine
and so together with other runs.
"""

import copy
import math
import queue
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal

from finetune.config.schema import RunConfig
from finetune.engine.encoded_prompts import positions_of
from finetune.engine.steps import RunSteps
from finetune.metrics.harness import load_task
from finetune.metrics.metric import Metric, Score
from finetune.run.background import POLL_SECONDS, start_thread
from finetune.run.evaluated_model import EvaluatedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Documents = Literal["eval", "test", "all"]
"""Documents with an even number are evaluated during training, the others at the end."""

FEWSHOT_SEED = 1234
"""The harness's own default: the examples in a prompt are the same ones at each evaluation."""


def evaluate_tasks(
    model: EvaluatedModel,
    metrics: Sequence[Metric],
    config: RunConfig,
    tokenizer: "PreTrainedTokenizerBase",
    documents: Documents,
) -> RunSteps[dict[str, Score]]:
    """Evaluate the tasks of some metrics.

    Args:
        model: The model.
        metrics: Metrics of tasks.
        config: The run's config.
        tokenizer: The base's tokenizer.
        documents: Which documents of each task.

    Returns:
        The scores by name.
    """
    scores: dict[str, Score] = {}
    for path in dict.fromkeys(metric.path for metric in metrics):
        of_task = [metric for metric in metrics if metric.path == path]
        results = yield from _evaluate_task(model, path, config, tokenizer, documents)
        for metric in of_task:
            score = _score(metric, results)
            if score is not None:
                scores[metric.names[0]] = score
    return scores


def _evaluate_task(
    model: EvaluatedModel,
    path: str,
    config: RunConfig,
    tokenizer: "PreTrainedTokenizerBase",
    documents: Documents,
) -> RunSteps[Mapping[str, Any]]:
    """Let the harness evaluate a task; return the task's results and its documents' scores."""
    from finetune.run.harness_model import HarnessModel, evaluate_by_harness

    task = _copy_task(load_task(path, config.evaluation.harness_path))
    numbers = _numbers(len(task.eval_docs), documents, config.evaluation.limit)
    calls: queue.SimpleQueue[tuple[list[Any], Future[Any]]] = queue.SimpleQueue()

    def ask(rows: list[Any]) -> Any:
        answer: Future[Any] = Future()
        calls.put((rows, answer))
        return answer.result()

    asking = HarnessModel(tokenizer, positions_of(model.model), ask)
    future = start_thread(lambda: evaluate_by_harness(asking, task, numbers))
    while not future.done():
        try:
            rows, answer = calls.get(timeout=POLL_SECONDS)
        except queue.Empty:
            # Other runs train while the harness prepares its requests.
            yield None
            continue
        try:
            answer.set_result((yield from model.evaluate(rows)))
        except BaseException as error:
            # The thread must not wait for ever.
            answer.set_exception(error)
            raise
    return future.result()


def _copy_task(task: Any) -> Any:
    """Return a task with requests and few-shot examples of its own, but the same documents."""
    copied = copy.copy(task)
    if hasattr(task, "sampler"):
        copied.sampler = copy.copy(task.sampler)
    copied.set_fewshot_seed(FEWSHOT_SEED)
    return copied


def _numbers(count: int, documents: Documents, limit: int | None) -> list[int]:
    first, step = {"eval": (0, 2), "test": (1, 2), "all": (0, 1)}[documents]
    return list(range(first, count, step))[:limit]


def _score(metric: Metric, results: Mapping[str, Any]) -> Score | None:
    """Return a metric's score; with the documents' scores where it is their mean."""
    name = metric.task_metric
    values = [
        value for key, value in results["values"].items() if key.split(",")[0] == name
    ]
    if not values:
        return None
    value = float(values[0])
    of_documents = [sample.get(name) for sample in results["samples"]]
    if all(isinstance(score, int | float) for score in of_documents):
        sums = tuple(map(float, of_documents))
        if math.isclose(math.fsum(sums) / len(sums), value, abs_tol=1e-9):
            return Score(value, metric.higher_is_better, sums, (1,) * len(sums))
    return Score(value, metric.higher_is_better)
