"""Passes through a base in steps, so that those of several groups of slots can take turns.

Each GPU of a spread base is to compute one group's blocks while the others compute those of other
groups (a pipeline, as Huang et al., 2019, GPipe). A GPU takes about a thousand kernels ahead; then
the host waits for it. A host that launched one whole pass after another would wait so for one GPU
while the next one has nothing left to do.

So too where each GPU computes all blocks for a group of its own (`gpu.borrowed_blocks`).
"""

import math
from collections.abc import Generator, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")

PassSteps = Generator[torch.device, None, T]
"""A pass in steps. Before each it yields the device that computes it; the result is returned."""


GROUPS_PER_GPU = 2
"""With more, a GPU waits for less of a step, but dequantises the weights more often."""


def group_size(slots: int, gpus: int) -> int:
    """Return how many slots are computed together where several GPUs share a base.

    Args:
        slots: That train or are evaluated.
        gpus: Over which the base is spread; on one, all slots are one group.
    """
    groups = 1 if gpus == 1 else min(slots, GROUPS_PER_GPU * gpus)
    return math.ceil(slots / groups)


def interleave(passes: Sequence[PassSteps[T]]) -> list[T]:
    """Launch passes together, a step on each device in turn.

    Of the passes that wait for a device, the first one gets it.

    Args:
        passes: Independent of each other, none of them begun.

    Returns:
        The result of each.
    """
    results: dict[int, T] = {}
    devices: dict[int, torch.device] = {}

    def advance(number: int) -> None:
        try:
            devices[number] = next(passes[number])
        except StopIteration as end:
            results[number] = end.value
            devices.pop(number, None)

    try:
        for number in range(len(passes)):
            advance(number)
        while devices:
            served = set()
            for number, device in list(devices.items()):
                if device not in served:
                    served.add(device)
                    advance(number)
    finally:
        # After an error the others hold the tensors of their passes.
        for steps in passes:
            steps.close()
    return [results[number] for number in range(len(passes))]


def complete_pass(steps: PassSteps[T]) -> T:
    """Launch all steps of one pass; return its result."""
    (result,) = interleave([steps])
    return result
