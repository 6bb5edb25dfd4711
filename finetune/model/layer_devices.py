"""Where the blocks of a base are: on one GPU, or spread over several.

Consecutive blocks of a spread base are together on a GPU. Its blocks and its head take their inputs
to their own GPU (`move_inputs`), so that the base's own code computes as on one.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HIDDEN_STATES = "hidden_states"
"""Name of a block's first argument in transformers' models."""


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a weight."""

    matrix: float
    """In the matrices of blocks."""
    other: float
    """In embeddings, norms and the output layer."""


@dataclass(frozen=True)
class Placement:
    """Over which GPUs the modules of a base are spread, by their numbers."""

    blocks: tuple[int, ...]
    """GPU of each block; consecutive blocks are together."""
    head: int
    """GPU of the output layer: the last one, or the first one, where it is the embedding."""

    @property
    def gpus(self) -> int:
        """How many there are."""
        return self.blocks[-1] + 1

    def blocks_on(self, gpu: int) -> range:
        """Return the numbers of a GPU's blocks."""
        first = self.blocks.index(gpu)
        return range(first, first + self.blocks.count(gpu))

    def device_map(self, base: "PreTrainedModel") -> dict[str, int]:
        """Return the GPU of each module, by the module's full name.

        Args:
            base: The base, or its shapes without weights.
        """
        decoder = base.get_decoder()
        head = base.get_output_embeddings()
        names = {id(module): name for name, module in base.named_modules()}
        gpu_of = {names[id(head)]: self.head}
        for name, child in decoder.named_children():
            full_name = f"{names[id(decoder)]}.{name}"
            if child is decoder.layers:
                for number, gpu in enumerate(self.blocks):
                    gpu_of[f"{full_name}.{number}"] = gpu
            else:
                # Rotary embeddings are computed beside the embeddings.
                gpu_of[full_name] = self.gpus - 1 if name == "norm" else 0
        return gpu_of

    def shares(self, base: "PreTrainedModel", size: WeightBytes) -> list[float]:
        """Return how much of the base's bytes each GPU holds, from 0 to 1.

        Args:
            base: The base, or its shapes without weights.
            size: Of its weights.
        """
        before, blocks, after = _sizes(base, size)
        held = [0.0] * self.gpus
        held[0] += before
        held[self.head] += after
        for gpu, block in zip(self.blocks, blocks, strict=True):
            held[gpu] += block
        return [size / sum(held) for size in held]


def spread_blocks(base: "PreTrainedModel", gpus: int, size: WeightBytes) -> Placement:
    """Spread a base over GPUs: about equally many bytes on each, and whole blocks.

    Args:
        base: The base, or its shapes without weights; `reason_not_spread` has no objection.
        gpus: How many there are.
        size: Bytes of its weights.
    """
    before, blocks, after = _sizes(base, size)
    total = before + sum(blocks) + after
    numbers: list[int] = []
    start = before
    for index, block in enumerate(blocks):
        even = int((start + block / 2) / total * gpus)
        # Each GPU has a block, however large embedding and head are.
        least = gpus - (len(blocks) - index)
        most = numbers[-1] + 1 if numbers else 0
        numbers.append(min(max(even, least), most, gpus - 1))
        start += block
    return Placement(tuple(numbers), 0 if _is_tied(base) else gpus - 1)


def reason_not_spread(base: "PreTrainedModel", gpus: int) -> str | None:
    """Return why a base can't be spread over several GPUs, or None.

    Args:
        base: The base without weights.
        gpus: How many there are.
    """
    config = base.config
    kind = f"a base of type {config.model_type}"
    # Gemma 4.
    shares_keys = getattr(config, "num_kv_shared_layers", None)
    if shares_keys or getattr(config, "hidden_size_per_layer_input", None):
        return f"the blocks of {kind} share tensors"
    decoder = base.get_decoder()
    children = dict(decoder.named_children())
    layers = children.get("layers")
    weighted = {
        name
        for name, child in children.items()
        if any(True for _ in child.parameters())
    }
    head = base.get_output_embeddings()
    others = len(list(base.parameters())) - len(list(decoder.parameters()))
    outside = 0 if head is None or _is_tied(base) else len(list(head.parameters()))
    if (
        not isinstance(layers, torch.nn.ModuleList)
        or head is None
        or not weighted <= {"embed_tokens", "layers", "norm"}
        or others != outside
    ):
        return f"{kind} has other modules than an embedding, blocks, a norm and a head"
    owners: dict[int, int] = {}
    for number, block in enumerate(layers):
        for weight in block.parameters():
            if owners.setdefault(id(weight), number) != number:
                return f"the blocks of {kind} share weights"
    if len(layers) < gpus:
        return f"the base has {len(layers)} blocks"
    return None


def _sizes(
    base: "PreTrainedModel", size: WeightBytes
) -> tuple[float, list[float], float]:
    """Bytes of the embedding, of each block, and of the norm and the head."""
    decoder = base.get_decoder()
    blocks = [
        sum(
            weight.numel() * (size.matrix if weight.dim() > 1 else size.other)
            for weight in block.parameters()
        )
        for block in decoder.layers
    ]
    before = base.get_input_embeddings().weight.numel() * size.other
    head = base.get_output_embeddings()
    after = 0 if _is_tied(base) else head.weight.numel() * size.other
    return before, blocks, after


def _is_tied(base: "PreTrainedModel") -> bool:
    """Whether embedding and head are one weight."""
    head: Any = base.get_output_embeddings()
    return head.weight is base.get_input_embeddings().weight


def count_stages(base: "PreTrainedModel") -> int:
    """Return how many devices hold weights of a base."""
    return len({weight.device for weight in base.parameters()})


def block_devices(decoder: Any) -> list[torch.device]:
    """Return the device of each block of a transformers decoder."""
    return [next(block.parameters()).device for block in decoder.layers]


def layer_device(base: "PreTrainedModel", name: str) -> torch.device:
    """Return the device of a linear layer of a base."""
    device: torch.device = base.get_submodule(name).weight.device
    return device


def move_inputs(base: "PreTrainedModel") -> None:
    """Let the blocks and the head of a spread base take their inputs to their own device.

    What all blocks of a pass get (masks, positions, angles of the rotary embedding) is copied once
    to each device.

    Args:
        base: Changed in place, by hooks.
    """
    decoder = base.get_decoder()
    copies = _Copies()
    for module in [*decoder.layers, base.get_output_embeddings()]:
        _move_inputs_of(module, copies)
    if any(True for _ in decoder.norm.parameters()):
        _move_inputs_of(decoder.norm, copies)


def _move_inputs_of(module: torch.nn.Module, copies: "_Copies") -> None:
    device = next(module.parameters()).device

    def move(
        _: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # The hidden states differ from block to block: no copy of them is kept.
        first = tuple(_moved(value, device) for value in arguments[:1])
        others = tuple(copies.of(value, device) for value in arguments[1:])
        moved = {
            name: _moved(value, device)
            if name == HIDDEN_STATES
            else copies.of(value, device)
            for name, value in named.items()
        }
        return (*first, *others), moved

    module.register_forward_pre_hook(move, with_kwargs=True)


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


class _Copies:
    """Copies of what all blocks of a pass get, on the devices that need them.

    Each lives as long as its original: a block that is computed again gets the same ones.
    """

    def __init__(self) -> None:
        self._copies: Any = WeakTensorKeyDictionary()
        """By the original and the device."""

    def of(self, value: Any, device: torch.device) -> Any:
        """Return a value with its tensors on a device; other objects are as they are."""
        if isinstance(value, torch.Tensor):
            if value.device == device or value.requires_grad:
                return value.to(device)
            copies = self._copies.setdefault(value, {})
            if device not in copies:
                copies[device] = value.to(device)
            return copies[device]
        if type(value) in (tuple, list):
            return type(value)(self.of(item, device) for item in value)
        if type(value) is dict:
            return {name: self.of(item, device) for name, item in value.items()}
        return value
