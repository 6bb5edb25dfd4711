"""All blocks of a base on one GPU, although others hold the weights of most of them.

Each GPU computes all blocks for slots of its own. The weights of a block that another GPU has
are borrowed: copied for one pass through it, while the block before it is computed, as FSDP gathers
them (Zhao et al., 2023). Two blocks' weights fit in at a time: those that are computed with, and
those that come next.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from finetune.model.device_copies import Copy, DeviceCopies

ALIGNMENT = 256
"""Bytes: kernels read 16 at once, and an allocation of PyTorch's begins so."""

BUFFERS = 2


class BlockSource(Protocol):
    """Gives the blocks of a decoder to a pass."""

    def device(self, number: int) -> torch.device:
        """Return where a block is computed."""

    def use(
        self, number: int, direction: int
    ) -> contextlib.AbstractContextManager[Any]:
        """Return a context with a block; what it computes is launched within the context.

        Args:
            number: The block's.
            direction: 1 in a forward pass, -1 in a backward pass.
        """


class PlainBlocks:
    """Each block is computed on the device of its weights."""

    def __init__(self, blocks: Sequence[Any], devices: Sequence[torch.device]) -> None:
        """Take the blocks.

        Args:
            blocks: All blocks.
            devices: Of each.
        """
        self._blocks = blocks
        self._devices = devices

    def device(self, number: int) -> torch.device:
        """See `BlockSource.device`."""
        return self._devices[number]

    def use(
        self, number: int, direction: int
    ) -> contextlib.AbstractContextManager[Any]:
        """See `BlockSource.use`."""
        return contextlib.nullcontext(self._blocks[number])


@dataclass(frozen=True)
class _BorrowedTensor:
    """A tensor of a replica, which is there while the replica's block is borrowed."""

    value: torch.Tensor
    """The block's, on its device."""
    owner: Any
    attribute: str
    """Of the owner, which the tensor is set to."""
    absent: torch.Tensor
    """Empty, on the replica's device: stands for the tensor meanwhile."""

    def set(self, tensor: torch.Tensor) -> None:
        setattr(self.owner, self.attribute, tensor)


@dataclass(frozen=True)
class Replica:
    """A block's module on another device than its own, without the weights of linear layers."""

    module: Any
    tensors: list[_BorrowedTensor]

    @property
    def size(self) -> int:
        """Bytes of what is borrowed."""
        return sum(_padded(tensor.value.nbytes) for tensor in self.tensors)

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """Divide a buffer of bytes [bytes] into the block's tensors."""
        views = []
        start = 0
        for tensor in self.tensors:
            value = tensor.value
            stored = buffer[start : start + value.nbytes]
            views.append(stored.view(value.dtype).view(value.shape))
            start += _padded(value.nbytes)
        return views

    @classmethod
    def of(cls, module: torch.nn.Module, device: torch.device) -> "Replica":
        """Copy a block to another device, but for what `reason_not_borrowed` counts as large.

        Args:
            module: Transformers' decoder layer; it is not changed.
            device: Where the replica is.
        """
        tensors: list[_BorrowedTensor] = []
        # What the copy has in place of objects, by their ids.
        copies: dict[int, Any] = {}

        def lend(value: torch.Tensor, owner: Any, attribute: str) -> None:
            absent = torch.empty(0, dtype=value.dtype, device=device)
            tensor = _BorrowedTensor(value, owner, attribute, absent)
            tensor.set(absent)
            tensors.append(tensor)

        for layer in _linear_layers(module):
            weight: Any = layer.weight
            empty = torch.empty(0, dtype=weight.dtype, device=device)
            # Of bitsandbytes' class nothing is needed but the state (`dense_weight`).
            replica: Any = torch.nn.Parameter(empty, requires_grad=False)
            lend(weight.data, replica, "data")
            copies[id(weight)] = replica
            state = getattr(weight, "quant_state", None)
            if state is not None:
                replica.quant_state = copies[id(state)] = copy.copy(state)
                lend(state.absmax, replica.quant_state, "absmax")
                if state.nested:
                    replica.quant_state.state2 = copy.copy(state.state2)
                replica.quant_state.to(device)
        for parameter in module.parameters():
            if id(parameter) not in copies:
                small = parameter.detach().to(device)
                copies[id(parameter)] = torch.nn.Parameter(small, requires_grad=False)
        for buffer in module.buffers():
            copies[id(buffer)] = buffer.to(device)
        return cls(copy.deepcopy(module, copies), tensors)


class BorrowedBlocks:
    """Implements `BlockSource`: all blocks are computed on one device."""

    def __init__(
        self,
        device: torch.device,
        blocks: Sequence[Any],
        replicas: Mapping[int, Replica],
        copies: DeviceCopies | None = None,
    ) -> None:
        """Allocate the buffers.

        Args:
            device: Computes the blocks.
            blocks: All blocks: on modules of the base that are there, or on the replicas'.
            replicas: Of the blocks that are elsewhere, by their numbers.
            copies: Copies to the device.
        """
        self._device = device
        self._blocks = blocks
        self._replicas = replicas
        self._copies = copies or DeviceCopies(device)
        size = max((replica.size for replica in replicas.values()), default=0)
        buffers = [
            torch.empty(size, dtype=torch.uint8, device=device) for _ in range(BUFFERS)
        ]
        self._views = {
            number: [replica.views(buffer) for buffer in buffers]
            for number, replica in replicas.items()
        }
        """Of each block's tensors, in each buffer."""
        self._held: list[int | None] = [None] * BUFFERS
        """Block that each buffer has, or will have when it is copied."""
        self._copied: list[torch.cuda.Event | None] = [None] * BUFFERS
        """After the copy into each buffer."""
        self._read: list[torch.cuda.Event | None] = [None] * BUFFERS
        """After what has last been computed from each buffer."""
        self._last = 0
        """The buffer that was computed from last."""

    def device(self, number: int) -> torch.device:
        """See `BlockSource.device`."""
        return self._device

    @contextlib.contextmanager
    def use(self, number: int, direction: int) -> Iterator[Any]:
        """See `BlockSource.use`."""
        replica = self._replicas.get(number)
        if replica is None:
            self._fetch_next(number, direction)
            yield self._blocks[number]
            return
        self._fetch(number)
        buffer = self._held.index(number)
        self._last = buffer
        self._copies.wait(self._copied[buffer])
        views = self._views[number][buffer]
        for tensor, view in zip(replica.tensors, views, strict=True):
            tensor.set(view)
        # Into the other buffer.
        self._fetch_next(number, direction)
        try:
            yield self._blocks[number]
        finally:
            for tensor in replica.tensors:
                tensor.set(tensor.absent)
            self._read[buffer] = self._copies.mark()

    def _fetch_next(self, number: int, direction: int) -> None:
        """Begin to copy the block that will be borrowed after this one, if there is one."""
        following = number + direction
        while following in range(len(self._blocks)):
            if following in self._replicas:
                self._fetch(following)
                return
            following += direction

    def _fetch(self, number: int) -> None:
        """Begin to copy a block, unless a buffer has it."""
        if number in self._held:
            return
        buffer = 1 - self._last
        replica = self._replicas[number]
        views = self._views[number][buffer]
        copies: list[Copy] = [
            (view, tensor.value)
            for view, tensor in zip(views, replica.tensors, strict=True)
        ]
        # While a copy has not begun, and if it can't, the buffer has no block.
        self._held[buffer] = None
        self._copied[buffer] = self._copies.start(copies, self._read[buffer])
        self._held[buffer] = number


def reason_not_borrowed(base: Any) -> str | None:
    """Return why the blocks of a base can't be borrowed, or None.

    Args:
        base: The loaded base.
    """
    for block in base.get_decoder().layers:
        in_linear_layers = set()
        for layer in _linear_layers(block):
            if not _is_plain_or_4bit(layer):
                return f"layers of {type(layer).__name__}"
            in_linear_layers.add(id(layer.weight))
        convolutions = {
            id(module.weight)
            for module in block.modules()
            if isinstance(module, torch.nn.Conv1d)
        }
        small = in_linear_layers | convolutions
        for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
            if tensor.dim() > 1 and id(tensor) not in small:
                return f"a matrix that is no linear layer's ({name})"
    return None


def _is_plain_or_4bit(layer: torch.nn.Linear) -> bool:
    weight: Any = layer.weight
    if type(weight).__name__ == "Params4bit":
        state = weight.quant_state
        return state is not None and bool(weight.is_contiguous())
    is_dense: bool = weight.is_floating_point() and weight.is_contiguous()
    return type(layer) is torch.nn.Linear and is_dense


def _linear_layers(block: torch.nn.Module) -> list[torch.nn.Linear]:
    # Quantised layers are linear layers too.
    return [layer for layer in block.modules() if isinstance(layer, torch.nn.Linear)]


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
