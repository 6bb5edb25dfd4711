"""Plain values of a config, before they are checked: each written in one way only.

Such values come from Hydra, from a run folder, or from Python.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from finetune.config.convert import is_number
from finetune.config.sections.evaluation import is_task
from finetune.errors import refusal

if TYPE_CHECKING:
    from omegaconf import DictConfig

PYTHON_DOCS_LIMIT = 240
"""Training rows of `python_docs` with `dataset.limit=auto`: an epoch of a few minutes on two CPU
cores."""

AUTO = "auto"

RUN_EVAL_STEPS = 0.25
"""`trainer.eval_steps=auto` in a run of its own: four evaluations, evenly spaced."""

STUDY_EVAL_STEPS = [0.1112, 0.3334]
"""The same in a study: rungs after a ninth and a third of the steps, rounded up, which have less
regret than four even ones at the same budget (docs/benchmarks.md)."""


def simplify_sources(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Write each source of `dataset.path` without a weight as text, a single one without the list.

    So that a config compares equal to one that says the same in another way.
    """
    dataset = values.get("dataset")
    if not isinstance(dataset, Mapping) or not isinstance(dataset.get("path"), list):
        return values
    items = [_simplify_source(item) for item in dataset["path"]]
    path: Any = items
    if len(items) == 1 and isinstance(items[0], str):
        path = items[0]
    return {**values, "dataset": {**dataset, "path": path}}


def _simplify_source(item: Any) -> Any:
    if not isinstance(item, Mapping) or not isinstance(item.get("path"), str):
        return item
    weight = item.get("weight", 1)
    has_weight_one = is_number(weight) and weight == 1
    # Any other key is left for `build` to refuse.
    if has_weight_one and set(item) <= {"path", "weight"}:
        return item["path"]
    return item


def resolve_limit(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Replace `dataset.limit=auto`: 240 for `python_docs`, null for any other path."""
    dataset = values.get("dataset")
    # What is no mapping is refused by `build`.
    if not isinstance(dataset, Mapping):
        return values
    if not _is_auto("dataset.limit", dataset.get("limit"), "a whole number, null"):
        return values
    limit = PYTHON_DOCS_LIMIT if dataset.get("path") == "python_docs" else None
    return {**values, "dataset": {**dataset, "limit": limit}}


def expand_task_objectives(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Replace each objective `harness/TASK` by `eval/harness/TASK`, and add the task's metric.

    `harness/TASK/NAME`, a further metric of a task, is accepted too.
    """
    objective = values.get("objective")
    names = objective if isinstance(objective, list) else [objective]
    short = [name for name in names if isinstance(name, str) and is_task(name)]
    evaluation = values.get("evaluation", {})
    metrics = evaluation.get("metrics", []) if isinstance(evaluation, Mapping) else None
    # What is no list is refused by `build`.
    if not short or not isinstance(metrics, list):
        return values
    expanded = [f"eval/{name}" if name in short else name for name in names]
    metrics = [*metrics]
    for name in short:
        if not any(f"{name}/".startswith(f"{metric}/") for metric in metrics):
            metrics.append("/".join(name.split("/")[:2]))
    return {
        **values,
        "objective": expanded if isinstance(objective, list) else expanded[0],
        "evaluation": {**evaluation, "metrics": metrics},
    }


def resolve_eval_steps(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Replace `trainer.eval_steps=auto` by its value in a run of its own."""
    trainer = values.get("trainer")
    # What is no mapping is refused by `build`.
    if not isinstance(trainer, Mapping):
        return values
    if not _is_auto(
        "trainer.eval_steps", trainer.get("eval_steps"), "a number, a list"
    ):
        return values
    return {**values, "trainer": {**trainer, "eval_steps": RUN_EVAL_STEPS}}


def _is_auto(key: str, value: Any, others: str) -> bool:
    """Return whether a value is `auto`.

    Any other text is refused here: `build` would name what else is allowed, but not `auto`.
    """
    if isinstance(value, str) and value != AUTO:
        raise refusal(key, value, f"must be {others} or auto")
    return bool(value == AUTO)


def resolve_study_eval_steps(
    composed: "DictConfig", eval_steps: float | list[float]
) -> bool:
    """Replace `trainer.eval_steps=auto` in the composed config of a study or of a trial.

    Args:
        composed: The config; it is changed.
        eval_steps: The study's value.

    Returns:
        Whether the value was `auto`.
    """
    from omegaconf import OmegaConf

    if OmegaConf.select(composed, "trainer.eval_steps") != AUTO:
        return False
    composed.trainer.eval_steps = eval_steps
    return True


def pick_learning_rate(values: dict[Any, Any]) -> None:
    """Replace a mapping in `model.learning_rate` by the rate of the run's base, or null.

    A model's YAML gives the rate of its own base, which must not apply to another `name_or_path`.
    """
    model = values.get("model")
    if not isinstance(model, dict):
        return
    rates = model.get("learning_rate")
    if isinstance(rates, Mapping):
        model["learning_rate"] = rates.get(model.get("name_or_path"))
