"""A smaller batch for a trial that ran out of memory."""

from collections.abc import Mapping
from typing import Any


def smaller_batch(trainer: Mapping[str, Any]) -> list[str] | None:
    """Return overrides that need less memory and leave the effective batch size as it was.

    Args:
        trainer: the `trainer` section of the run's config.

    Returns:
        Overrides that divide the batch by its smallest factor, multiply the gradient accumulation
        by it, and halve the evaluation batch; None if both batches have one row.
    """
    train_rows = trainer.get("per_device_train_batch_size", 1)
    eval_rows = trainer.get("per_device_eval_batch_size", 1)
    accumulation = trainer.get("gradient_accumulation_steps", 1)
    if train_rows == eval_rows == 1:
        return None
    # A divisor: the effective batch size must stay exactly as it was.
    factor = _smallest_factor(train_rows)
    smaller_eval_rows = max(1, eval_rows // 2)
    return [
        f"trainer.per_device_train_batch_size={train_rows // factor}",
        f"trainer.gradient_accumulation_steps={accumulation * factor}",
        f"trainer.per_device_eval_batch_size={smaller_eval_rows}",
    ]


def _smallest_factor(number: int) -> int:
    """Return the smallest factor above 1; 1 for the number 1."""
    for factor in range(2, number + 1):
        if number % factor == 0:
            return factor
    return 1
