"""A base as passes compute it: groups of requests, their batches, losses from hidden states."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

from finetune.engine.packed.backends import Backends
from finetune.engine.packed.base_devices import BaseDevices
from finetune.engine.packed.batch import BatchLayout, PackedBatch, lay_out
from finetune.engine.packed.losses import TokenLosses, token_losses
from finetune.engine.packed.pipeline import group_size
from finetune.engine.packed.requests import Evaluate, ForwardBackward
from finetune.engine.packed.requests_by_device import by_device
from finetune.model.architectures import logit_transform_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_Request = TypeVar("_Request", ForwardBackward, Evaluate)


class PackedBase:
    """What passes that train and passes that evaluate have in common."""

    def __init__(
        self,
        base: "PreTrainedModel",
        backends: Backends,
        devices: BaseDevices,
        shares_prefixes: bool,
    ) -> None:
        """Read the head of a base.

        Args:
            base: The base.
            backends: Compute it.
            devices: Those of the base.
            shares_prefixes: Whether a common prefix of a batch's rows is computed once.
        """
        self.base = base
        self.backends = backends
        self.devices = devices
        self._shares_prefixes = shares_prefixes
        self._head = base.get_output_embeddings()
        self._logit_transform = logit_transform_of(base.config)

    def groups(self, requests: Sequence[_Request]) -> list[Sequence[_Request]]:
        """Divide requests into those that are computed together.

        On several GPUs each GPU has a group of its own, whose blocks it computes. Or one group's
        blocks are computed by a GPU while another computes the next blocks of the group before
        (`pipeline`).

        Args:
            requests: One for each slot.
        """
        if self.backends.current.borrows_blocks:
            return list(by_device(requests).values())
        size = group_size(len(requests), self.devices.stages)
        return [
            requests[start : start + size] for start in range(0, len(requests), size)
        ]

    def batch(self, requests: Sequence[ForwardBackward | Evaluate]) -> PackedBatch:
        """Return the packed batch of a group."""
        layouts = [self._layout(request) for request in requests]
        return PackedBatch(layouts, self.devices.of_batch(requests[0].slot))

    def _layout(self, request: ForwardBackward | Evaluate) -> BatchLayout:
        if isinstance(request, ForwardBackward) and request.layout is not None:
            return request.layout
        group_size = request.group_size if self._shares_prefixes else 1
        return lay_out(request.rows, group_size)

    def token_losses(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        loss_weights: torch.Tensor | None,
    ) -> TokenLosses:
        """Compute the losses of answer tokens. See `losses.token_losses`."""
        return token_losses(
            self.backends.current,
            self._head,
            self._logit_transform,
            hidden.to(self.devices.head),
            targets.to(self.devices.head),
            loss_weights,
        )
