"""Steps of a run: how many, in which order rows are visited, where it is evaluated."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from finetune.config.schema import RunConfig


@dataclass(frozen=True)
class Step:
    """The rows of an optimizer step, batch by batch."""

    epoch: int
    batches: list[list[int]]


def step_batches(lengths: list[int], config: RunConfig, total: int) -> Iterator[Step]:
    """The rows of each optimizer step, in the order that both engines have; an epoch's last step may be smaller."""
    trainer = config.trainer
    rows, batches = trainer.per_device_train_batch_size, trainer.gradient_accumulation_steps
    done = epoch = 0
    while done < total:
        order = epoch_order(lengths, trainer.effective_batch_size, config.seed, epoch, trainer.group_by_length)
        parts = [order[start : start + rows] for start in range(0, len(order), rows)]
        for start in range(0, len(parts), batches):
            if done < total:
                yield Step(epoch, parts[start : start + batches])
                done += 1
        epoch += 1


def resolve_steps(setting: float, total: int) -> int:
    """A number of steps from a setting that may be a share of them all; 0 stays 0: never."""
    return max(1, math.ceil(setting * total)) if 0 < setting < 1 else int(setting)


def evaluation_rungs(setting: float | list[float], total: int) -> dict[int, int]:
    """The steps of a run after which it is evaluated, and each one's index: how many times as far as the first.

    They are every so many steps, or those of a list, and the last one in any case.
    """
    if isinstance(setting, list):
        points = sorted(part * total if part < 1 else part for part in setting if part)
    else:
        every = resolve_steps(setting, total)
        points = [*range(every, total, every)] if every else []
    points = [*(point for point in points if point < total), total]
    rungs = {0: 0}
    for point in points:
        index = max(round(point / points[0]), max(rungs.values()) + 1)
        rungs.setdefault(math.ceil(point), index)
    return rungs


def total_steps(config: RunConfig, rows: int) -> int:
    """Optimizer steps of a run on so many rows (or packed sequences)."""
    trainer = config.trainer
    if trainer.max_steps > 0:
        return trainer.max_steps
    batches = math.ceil(rows / trainer.per_device_train_batch_size)
    return math.ceil(trainer.num_train_epochs * math.ceil(batches / trainer.gradient_accumulation_steps))


def epoch_order(lengths: Sequence[int], batch_rows: int, seed: int, epoch: int, group_by_length: bool) -> list[int]:
    """The order in which an epoch visits the rows: the same for every engine, whatever else draws random numbers.

    Grouped by length, rows are shuffled, sorted within stretches of 50 batches, and the longest batch comes
    first, as in transformers' `LengthGroupedSampler`.
    """

    import torch

    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    if group_by_length:
        from transformers.trainer_pt_utils import get_length_grouped_indices

        order: list[int] = get_length_grouped_indices(list(lengths), batch_rows, generator=generator)
        return order
    return [int(index) for index in torch.randperm(len(lengths), generator=generator)]
