"""The schedule of a run: number of steps, order of the rows, steps with an evaluation.

Loads torch only when it draws an order: `finetune.run.run` imports this module at its top.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from finetune.config.schema import RunConfig
from finetune.config.sections.evaluation import EvaluationSettings
from finetune.config.sections.optimizer import OptimizerSettings

SEED_STRIDE = 1_000_003
"""Distance between the seeds of two runs' first epochs, more than a run has epochs."""


@dataclass(frozen=True)
class Step:
    """The rows of an optimizer step."""

    epoch: int
    batches: list[list[int]]
    """Row numbers of each batch; more than one with gradient accumulation."""


def step_batches(lengths: list[int], config: RunConfig, total: int) -> Iterator[Step]:
    """Yield the rows of each optimizer step, in the order of both engines.

    An epoch's last step may have fewer rows.

    Args:
        lengths: Tokens of each row.
        config: The run's config.
        total: Number of optimizer steps.
    """
    trainer = config.trainer
    batch_rows = trainer.per_device_train_batch_size
    accumulation = trainer.gradient_accumulation_steps
    step = 0
    epoch = 0
    while step < total:
        order = epoch_order(
            lengths,
            trainer.effective_batch_size,
            config.seed,
            epoch,
            trainer.group_by_length,
        )
        batches = [
            order[start : start + batch_rows]
            for start in range(0, len(order), batch_rows)
        ]
        for start in range(0, len(batches), accumulation):
            if step == total:
                return
            yield Step(epoch, batches[start : start + accumulation])
            step += 1
        epoch += 1


def resolve_steps(setting: float, total: int) -> int:
    """Return a number of steps from a setting that may be a share of all steps.

    Args:
        setting: A number of steps, or a share of them (above 0, below 1); 0: never, stays 0.
        total: Optimizer steps of the whole run.
    """
    # As transformers turns a share into steps.
    if 0 < setting < 1:
        return max(1, math.ceil(setting * total))
    return int(setting)


def warmup_steps(settings: OptimizerSettings, total: int) -> int:
    """Return the optimizer step after which the learning rate has risen from 0.

    Args:
        settings: The optimizer's settings.
        total: Optimizer steps of the whole run.
    """
    # transformers ignores the setting here.
    if settings.lr_scheduler_type == "constant":
        return 0
    # Rounded as transformers does.
    return math.ceil(settings.warmup_ratio * total)


def evaluation_rungs(setting: float | list[float], total: int) -> dict[int, int]:
    """Return the optimizer steps after which a run is evaluated, each with its rung's index.

    Args:
        setting: `trainer.eval_steps`: an interval, or a list of steps, each in steps or as a share
            of all steps; 0: none.
        total: Optimizer steps of the whole run; an evaluation after the last step is added.

    Returns:
        Rung indices by step: 0 before the first step, then the position as a multiple of the first
        rung's, at least one more than the index before.
    """
    if isinstance(setting, list):
        points = sorted(_position(value, total) for value in setting if value)
    else:
        interval = resolve_steps(setting, total)
        points = [*range(interval, total, interval)] if interval else []
    points = [point for point in points if point < total]
    points.append(total)
    first = points[0]
    rungs = {0: 0}
    for point in points:
        # Positions are rounded here, after the division: a rung of several runs with different
        # numbers of steps gets the same index, although its steps are rounded differently.
        multiple = round(point / first)
        next_index = max(rungs.values()) + 1
        # Two positions may round up to one step; it is evaluated once.
        rungs.setdefault(math.ceil(point), max(multiple, next_index))
    return rungs


def share_rungs(setting: float | list[float], total: int) -> set[int]:
    """Return the steps of `evaluation_rungs` that are shares of the run, not numbers of steps."""
    values = setting if isinstance(setting, list) else [setting]
    steps: set[int] = set()
    for value in values:
        if 0 < value < 1:
            single = [value] if isinstance(setting, list) else value
            steps |= evaluation_rungs(single, total).keys() - {0, total}
    return steps


def answer_steps(settings: EvaluationSettings, rungs: dict[int, int]) -> list[int]:
    """Return the optimizer steps after which answers are evaluated (`evaluation.every`).

    Args:
        settings: The metrics of generated answers, and when they are computed.
        rungs: From `evaluation_rungs`.
    """
    if not settings.metrics:
        return []
    steps = [*rungs]
    due = steps[:: settings.every] if settings.every else []
    return sorted({*due, steps[-1]})


def _position(value: float, total: int) -> float:
    """Return a position in steps, not rounded, from a number of steps or a share of all steps."""
    return value * total if value < 1 else value


def total_steps(config: RunConfig, lengths: list[int]) -> int:
    """Return the number of optimizer steps of a run, with `trainer.max_tokens`.

    Args:
        config: The run's config.
        lengths: Tokens of each training row, or packed sequence.
    """
    steps = unlimited_steps(config, len(lengths))
    limit = config.trainer.max_tokens
    if limit is None:
        return steps
    tokens = 0
    for number, step in enumerate(step_batches(lengths, config, steps), 1):
        tokens += sum(lengths[index] for batch in step.batches for index in batch)
        if tokens >= limit:
            return number
    return steps


def unlimited_steps(config: RunConfig, rows: int) -> int:
    """Return the number of optimizer steps by epochs or `trainer.max_steps` alone.

    Args:
        config: The run's config.
        rows: Number of training rows, or of packed sequences.
    """
    trainer = config.trainer
    if trainer.max_steps > 0:
        return trainer.max_steps
    # Rounded as the Trainer does: a smaller last batch counts, and so does a smaller last step.
    batches = math.ceil(rows / trainer.per_device_train_batch_size)
    steps_per_epoch = math.ceil(batches / trainer.gradient_accumulation_steps)
    return math.ceil(trainer.num_train_epochs * steps_per_epoch)


def epoch_order(
    lengths: Sequence[int],
    batch_rows: int,
    seed: int,
    epoch: int,
    group_by_length: bool,
) -> list[int]:
    """Return the order in which an epoch visits the rows.

    It depends on the arguments alone, not on the engine or on any global random state.

    Args:
        lengths: Tokens of each row.
        batch_rows: Rows of an optimizer step.
        seed: The run's seed.
        epoch: Number of the epoch, from 0.
        group_by_length: Sort shuffled rows by length within stretches of 50 batches, the longest
            batch first, as transformers' `LengthGroupedSampler` does.
    """
    import torch

    # Seeded for each epoch: the Trainer that resumes asks for the order of one epoch alone.
    epoch_seed = seed * SEED_STRIDE + epoch
    generator = torch.Generator().manual_seed(epoch_seed)
    if group_by_length:
        from transformers.trainer_pt_utils import get_length_grouped_indices

        order: list[int] = get_length_grouped_indices(
            list(lengths), batch_rows, generator=generator
        )
        return order
    shuffled: list[int] = torch.randperm(len(lengths), generator=generator).tolist()
    return shuffled
