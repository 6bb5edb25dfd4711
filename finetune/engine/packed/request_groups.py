"""Groups of requests: those that are computed together, where a base has several GPUs."""

import itertools
from collections.abc import Sequence
from typing import TypeVar

import torch

from finetune.engine.packed.pipeline import group_size
from finetune.engine.packed.requests import PackedRequest

_Request = TypeVar("_Request", bound=PackedRequest)


def pass_groups(
    requests: Sequence[_Request], stages: int, borrows_blocks: bool
) -> list[Sequence[_Request]]:
    """Divide requests into those that are computed together.

    On several GPUs each GPU has a group of its own, whose blocks it computes. Or one group's
    blocks are computed by a GPU while another computes the next blocks of the group before
    (`pipeline`).

    Args:
        requests: One for each slot.
        stages: GPUs that compute one after the other.
        borrows_blocks: Whether each GPU computes all blocks for slots of its own.
    """
    if borrows_blocks:
        return list(by_device(requests).values())
    size = group_size(len(requests), stages)
    return [requests[start : start + size] for start in range(0, len(requests), size)]


def by_device(requests: Sequence[_Request]) -> dict[torch.device, list[_Request]]:
    """Return the requests of the slots on each device."""
    groups: dict[torch.device, list[_Request]] = {}
    for request in requests:
        groups.setdefault(request.slot.device, []).append(request)
    return groups


def alternating(requests: Sequence[PackedRequest]) -> list[PackedRequest]:
    """Order requests so that their slots' devices take turns."""
    rounds = itertools.zip_longest(*by_device(requests).values())
    return [each for turn in rounds for each in turn if each is not None]
