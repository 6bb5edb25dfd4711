"""The pass that trains: the gradients of several slots' batches.

`bank.py` executes requests by it; `training.py` is the loop of a run that yields them.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from finetune.compat import compute_norms
from finetune.engine.packed.batch import PackedBatch
from finetune.engine.packed.embedding_noise import embedding_noise
from finetune.engine.packed.packed_base import PackedBase
from finetune.engine.packed.pass_figures import PassFigures
from finetune.engine.packed.pass_timer import PassTimer
from finetune.engine.packed.pipeline import PassSteps, interleave
from finetune.engine.packed.requests import ForwardBackward, ForwardBackwardResult
from finetune.engine.packed.requests_by_device import by_device
from finetune.model.device import to_device


@dataclass
class _ForwardResult:
    """A forward pass whose backward pass follows."""

    batch: PackedBatch
    hidden: torch.Tensor | None
    trace: Any
    loss_weights: torch.Tensor

    def take_hidden(self) -> torch.Tensor:
        """Return `hidden` and let go of it, which makes room for the backward pass."""
        hidden = self.hidden
        assert hidden is not None
        self.hidden = None
        return hidden


def compute_gradients(
    packed_base: PackedBase, requests: Sequence[ForwardBackward]
) -> list[ForwardBackwardResult]:
    """Compute the gradients of several slots' batches in one pass.

    Args:
        packed_base: The base that the slots are on.
        requests: One for each slot.

    Returns:
        The result of each request, which a GPU may still be computing. The gradients replace
        those in the slots.
    """
    requests_by_device = by_device(requests)
    timers = {device: PassTimer(device) for device in requests_by_device}
    # In a pipeline adapters are copied between GPUs before the passes, and their gradients
    # after them: a copy waits for what both GPUs have to compute.
    for request in requests:
        request.slot.refresh_weights()
    groups = packed_base.groups(requests)
    passes = interleave([_forward(packed_base, group) for group in groups])
    group_losses = interleave([_backward(packed_base, each) for each in passes])
    losses = _by_request(groups, group_losses)
    for request in requests:
        request.slot.collect_gradient()
    results: dict[int, ForwardBackwardResult] = {}
    for device, of_device in requests_by_device.items():
        norms = compute_norms([request.slot.gradient for request in of_device])
        timers[device].stop()
        slot_losses = torch.stack([losses[id(request)] for request in of_device])
        figures = PassFigures(slot_losses, torch.stack(norms).double(), timers[device])
        for index, request in enumerate(of_device):
            results[id(request)] = ForwardBackwardResult(figures, index)
    return [results[id(request)] for request in requests]


def _forward(
    packed_base: PackedBase, requests: Sequence[ForwardBackward]
) -> PassSteps[_ForwardResult]:
    """Compute the hidden states of a group. The embeddings are computed by the call itself."""
    batch = packed_base.batch(requests)
    slots = [request.slot for request in requests]
    dropout_steps = [request.dropout_step for request in requests]
    with embedding_noise(packed_base.base, requests, batch):
        steps = packed_base.backends.current.forward(batch, slots, dropout_steps)
    return _finish_forward(packed_base, requests, batch, steps)


def _finish_forward(
    packed_base: PackedBase,
    requests: Sequence[ForwardBackward],
    batch: PackedBatch,
    steps: PassSteps[tuple[torch.Tensor, Any]],
) -> PassSteps[_ForwardResult]:
    hidden, trace = yield from steps
    # While a GPU computes the forward pass.
    loss_weights = _loss_weights(requests, batch)
    loss_weights = to_device(loss_weights, packed_base.devices.head)
    return _ForwardResult(batch, hidden, trace, loss_weights)


def _loss_weights(
    requests: Sequence[ForwardBackward], batch: PackedBatch
) -> torch.Tensor:
    """The weight of each answer token's loss [answer tokens]."""
    weights = numpy.array([request.loss_weight for request in requests], "float32")
    return torch.from_numpy(weights.repeat(batch.target_counts))


def _backward(
    packed_base: PackedBase, forward_result: _ForwardResult
) -> PassSteps[list[torch.Tensor]]:
    """Compute the gradients of a pass; return the slots' losses."""
    # Not the head's, which may be the first one: the loss belongs to the last blocks.
    yield packed_base.devices.last_block
    batch = forward_result.batch
    result = packed_base.token_losses(
        forward_result.take_hidden(), batch.targets, forward_result.loss_weights
    )
    assert result.gradient is not None
    backend = packed_base.backends.current
    yield from backend.backward(forward_result.trace, result.gradient)
    # Each slot's own tokens are summed alone: NaN in one slot must not reach another.
    # In float64 the sum hardly depends on the order of its terms.
    losses = torch.split(result.losses.double(), batch.target_counts)
    return [slot_losses.sum() for slot_losses in losses]


def _by_request(
    groups: Sequence[Sequence[ForwardBackward]], values: Sequence[list[torch.Tensor]]
) -> dict[int, torch.Tensor]:
    """The value of each request of each group, by the request's id."""
    requests = itertools.chain(*groups)
    flat = itertools.chain(*values)
    return {id(request): value for request, value in zip(requests, flat, strict=True)}
