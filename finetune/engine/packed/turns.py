"""Passes through a base in steps, so that those of several groups of slots can take turns.

Each GPU of a spread base is to compute one group's blocks while the others compute those of other
groups (a pipeline, as Huang et al., 2019, GPipe). A GPU is given about a thousand kernels ahead; then
the host waits for it. A host that launched one whole pass after another would wait so for one GPU
while the next one has nothing left to do.
"""

from collections.abc import Generator, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")

Steps = Generator[torch.device, None, T]
"""A pass in steps. Before each it yields the device that computes the step; it returns its result."""


def take_turns(passes: Sequence[Steps[T]]) -> list[T]:
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


def complete(steps: Steps[T]) -> T:
    """Launch all steps of one pass; return its result."""
    (result,) = take_turns([steps])
    return result
