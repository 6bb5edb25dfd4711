"""Evaluate tasks of lm-evaluation-harness with a run's model, as it is in memory.

The harness runs in a thread; the run computes the likelihoods and the answers that it asks for, by
the run's engine and so together with other runs.
"""

import copy
import dataclasses
import logging
import math
import queue
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from finetune.config.schema import RunConfig
from finetune.data.token_file import Example
from finetune.engine.encoded_prompts import (
    Answers,
    EncodedPrompts,
    end_tokens,
    positions_of,
)
from finetune.engine.evaluation import Evaluation
from finetune.engine.steps import RunSteps
from finetune.metrics.harness import Benchmark, load_benchmark
from finetune.metrics.metric import Metric, Score
from finetune.run.background import POLL_SECONDS, start_thread
from finetune.run.evaluated_model import EvaluatedModel
from finetune.run.harness_prompts import Documents, document_numbers, prompt_format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.run.harness_model import HarnessModel

log = logging.getLogger(__name__)

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
    settings = config.evaluation
    paths = dict.fromkeys(metric.path for metric in metrics)
    benchmarks = [load_benchmark(path, settings.harness_path) for path in paths]
    for number, benchmark in enumerate(benchmarks, start=1):
        asks_later = settings.generates or any(
            later.generates for later in benchmarks[number:]
        )
        harness = _Harness(
            model, copy_benchmark(benchmark), config, tokenizer, documents, asks_later
        )
        results = yield from harness.evaluate()
        for metric in metrics:
            if metric.path != benchmark.path:
                continue
            score = _score(metric, results)
            if score is not None:
                scores[metric.names[0]] = score
    return scores


class _Harness:
    """The harness in its thread, which evaluates one task or group of tasks."""

    def __init__(
        self,
        model: EvaluatedModel,
        benchmark: Benchmark,
        config: RunConfig,
        tokenizer: "PreTrainedTokenizerBase",
        documents: Documents,
        asks_later: bool,
    ) -> None:
        self._model = model
        self._benchmark = benchmark
        self._config = config
        self._tokenizer = tokenizer
        self._documents = documents
        self._calls: queue.SimpleQueue[tuple[RunSteps[Any], Future[Any]]] = (
            queue.SimpleQueue()
        )
        self._asks_later = asks_later
        """Whether the evaluation asks for answers after this task."""
        self._will_ask = benchmark.generates or asks_later
        """Whether it does from now on."""

    def evaluate(self) -> RunSteps[Mapping[str, Any]]:
        """Return the task's values and its documents' scores."""
        model = self._harness_model()
        future = start_thread(lambda: self._ask_harness(model))
        while not future.done():
            try:
                steps, response = self._calls.get(timeout=POLL_SECONDS)
            except queue.Empty:
                # Other runs train while the harness prepares its requests.
                yield from self._model.wait(self._will_ask)
                continue
            try:
                response.set_result((yield from steps))
            except BaseException as error:
                # The thread must not wait for ever.
                response.set_exception(error)
                raise
        results = future.result()
        # Here and not in the thread, so that it goes to the run's log.
        if model.cut_prompts:
            log.warning(
                "%s: the beginnings of %d prompts are cut: the base has too few positions",
                self._benchmark.path,
                model.cut_prompts,
            )
        return results

    def _harness_model(self) -> "HarnessModel":
        from finetune.run.harness_model import HarnessModel

        base = self._model.model
        plain = prompt_format(self._config, self._tokenizer)
        ends = end_tokens(base, plain.ends)
        return HarnessModel(
            self._benchmark.path,
            self._tokenizer,
            dataclasses.replace(plain, ends=ends),
            positions_of(base),
            self._evaluate_rows,
            self._answer,
        )

    def _ask_harness(self, model: "HarnessModel") -> Mapping[str, Any]:
        """Let the harness evaluate. Called in the thread."""
        from finetune.run.harness_calls import evaluate_by_harness

        limit = self._config.evaluation.limit
        numbers = {
            name: document_numbers(len(task.eval_docs), self._documents, limit)
            for name, task in self._benchmark.tasks.items()
        }
        return evaluate_by_harness(model, self._benchmark, numbers)

    def _evaluate_rows(self, rows: list[Example]) -> Evaluation:
        evaluation: Evaluation = self._ask(self._model.evaluate(rows))
        return evaluation

    def _answer(self, prompts: list[EncodedPrompts]) -> list[Answers]:
        answers: list[Answers] = self._ask(self._answer_all(prompts))
        return answers

    def _answer_all(self, prompts: list[EncodedPrompts]) -> RunSteps[list[Answers]]:
        """Answer prompts, one item after another, with no wait for the thread in between."""
        answers = []
        for item in prompts:
            answers.append((yield from self._model.answer(item)))
        self._will_ask = self._asks_later
        return answers

    def _ask(self, steps: RunSteps[Any]) -> Any:
        """Let the run do some steps, and wait for their result. Called in the thread."""
        response: Future[Any] = Future()
        self._calls.put((steps, response))
        return response.result()


def copy_benchmark(benchmark: Benchmark) -> Benchmark:
    """Return tasks with requests and few-shot examples of their own, but the same documents."""
    tasks = {name: _copy_task(task) for name, task in benchmark.tasks.items()}
    return dataclasses.replace(benchmark, tasks=tasks)


def _copy_task(task: Any) -> Any:
    copied = copy.copy(task)
    if hasattr(task, "sampler"):
        copied.sampler = copy.copy(task.sampler)
    copied.set_fewshot_seed(FEWSHOT_SEED)
    return copied


def _score(metric: Metric, results: Mapping[str, Any]) -> Score | None:
    """Return a metric's score; with the documents' scores where it is their mean."""
    assert metric.task_metric is not None
    if metric.task_metric not in results["values"]:
        return None
    value = float(results["values"][metric.task_metric])
    name, _, filter_name = metric.task_metric.rpartition(",")
    of_documents = [
        sample.get(name)
        for sample in results["samples"]
        if sample["filter"] == filter_name
    ]
    if all(isinstance(score, int | float) for score in of_documents):
        sums = tuple(map(float, of_documents))
        if sums and math.isclose(math.fsum(sums) / len(sums), value, abs_tol=1e-9):
            return Score(value, metric.higher_is_better, sums, (1,) * len(sums))
    return Score(value, metric.higher_is_better)
