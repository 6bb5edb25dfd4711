"""What is asked of lm-evaluation-harness: to evaluate tasks, and to build their requests.

Imported only where a task is evaluated or planned, because it imports `lm_eval`.
"""

from collections.abc import Mapping
from typing import Any

from lm_eval.evaluator import evaluate

from finetune.compat import silence_harness
from finetune.metrics.harness import Benchmark
from finetune.run.harness_model import HarnessModel


def evaluate_by_harness(
    model: HarnessModel, benchmark: Benchmark, numbers: Mapping[str, list[int]]
) -> Mapping[str, Any]:
    """Let the harness evaluate documents of a task, or of a group of tasks.

    Args:
        model: Answers the harness's requests.
        benchmark: The tasks; their requests are replaced.
        numbers: The documents of each task, by their numbers.

    Returns:
        `values`, the metrics by `METRIC,FILTER`, and `samples`, those of each document.
    """
    silence_harness()
    results = evaluate(
        model,
        {"tasks": dict(benchmark.tasks), "groups": dict(benchmark.groups)},
        samples=dict(numbers),
        bootstrap_iters=0,
        system_instruction=model.prompt_format.system,
        apply_chat_template=model.prompt_format.template is not None,
        fewshot_as_multiturn=True,
    )
    samples = [
        sample for name in benchmark.tasks for sample in results["samples"][name]
    ]
    return {"values": results["results"][benchmark.name], "samples": samples}


def build_requests(model: HarnessModel, task: Any, numbers: list[int]) -> list[Any]:
    """Return the harness's requests for documents of a task, without asking them.

    Args:
        model: Formats the prompts.
        task: The task; its requests are replaced.
        numbers: The documents, by their numbers.
    """
    silence_harness()
    has_template = model.prompt_format.template is not None
    task.build_all_requests(
        samples=numbers,
        system_instruction=model.prompt_format.system,
        apply_chat_template=has_template,
        fewshot_as_multiturn=True,
        chat_template=model.apply_chat_template if has_template else None,
    )
    requests: list[Any] = task.instances
    return requests
