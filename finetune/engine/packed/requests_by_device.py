"""Requests by the device of their slots: on several GPUs each may compute for slots of its own."""

import itertools
from collections.abc import Sequence
from typing import TypeVar

import torch

from finetune.engine.packed.requests import PackedRequest

_Request = TypeVar("_Request", bound=PackedRequest)


def by_device(requests: Sequence[_Request]) -> dict[torch.device, list[_Request]]:
    """Return the requests of the slots on each device."""
    grouped: dict[torch.device, list[_Request]] = {}
    for request in requests:
        grouped.setdefault(request.slot.device, []).append(request)
    return grouped


def alternating(requests: Sequence[PackedRequest]) -> list[PackedRequest]:
    """Order requests so that their slots' devices take turns."""
    rounds = itertools.zip_longest(*by_device(requests).values())
    return [each for turn in rounds for each in turn if each is not None]
