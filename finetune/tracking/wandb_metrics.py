"""The directions of metrics, as W&B is told them."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from finetune.config.schema import RunConfig
from finetune.metrics.load import higher_is_better, load_metrics

if TYPE_CHECKING:
    import wandb


def best_values(config: RunConfig) -> dict[str, str]:
    """Return whether the least (`min`) or the largest value (`max`) of each metric is the best.

    Of the metrics of evaluations, by their names in W&B, and of `objective`.
    """
    metrics = load_metrics(config.evaluation)
    scores = [name for metric in metrics for name in metric.names]
    names = config.allowed_objectives(scores)
    best = {}
    for name in names:
        if name.startswith("eval/"):
            best[name] = "max" if higher_is_better(name, metrics) else "min"
    if len(config.objectives) == 1:
        rises = higher_is_better(config.objectives[0], metrics)
        best["objective"] = "max" if rises else "min"
    return best


def define_metrics(run: "wandb.Run", best: Mapping[str, str]) -> None:
    """Let W&B show the best value of each metric beside the last one, while the run trains.

    Args:
        run: The open W&B run.
        best: What `best_values` returns.
    """
    for name, value in best.items():
        # To W&B `*` is a pattern, and a backslash can't be written: such names show the last value.
        if not re.search(r"[*\\]", name):
            # Else a dot begins a level below, where no metric is.
            run.define_metric(name.replace(".", r"\."), summary=f"{value},last")
