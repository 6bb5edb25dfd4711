"""How many of a decoder's blocks keep their activations (`trainer.gradient_checkpointing`).

A block that keeps them is not computed again for its backward pass: with half of the blocks stored,
half of the time that checkpointing costs is saved. They are the last ones, whose backward pass
comes first.
"""

from dataclasses import dataclass

import torch

from finetune.config.sections.trainer import Checkpointing
from finetune.model.memory import GIB, USABLE, available_memory

WITHIN_PASS = 2
"""Blocks whose activations take at least as much as a backward pass needs within itself."""

LOGITS = GIB
"""Bytes for a chunk of logits: what the largest vocabularies take (262,144 columns, capped)."""


def fewest_stored(layers: int, slots: int) -> int:
    """Return how many of the blocks keep their activations where memory is short.

    The very last one does, because its backward pass comes at once. With several slots, which
    need room for as many batches anyway, an eighth of the blocks do.

    Args:
        layers: Blocks of the decoder.
        slots: Slots that train together.

    Returns:
        A number of blocks, at least 1.
    """
    if slots == 1:
        return 1
    return max(1, layers // 8)


@dataclass(frozen=True)
class BlockMemory:
    """What a block of a pass takes, in bytes."""

    activations: int
    block_input: int
    """Stays of each block, which is computed again from it."""
    weights: int
    """Dequantised: several slots keep those of one block from its second forward pass on."""


def most_stored(layers: int, slots: int, block: BlockMemory, usable: int) -> int:
    """Return how many of the blocks may keep their activations in so much memory.

    Args:
        layers: Blocks of the decoder.
        slots: Slots that train together.
        block: Of one block in the pass.
        usable: Bytes for all that the pass allocates.

    Returns:
        A number of blocks, at least `fewest_stored`.
    """
    fewest = fewest_stored(layers, slots)
    inputs = layers * block.block_input
    needed = (fewest + WITHIN_PASS) * block.activations + block.weights + LOGITS
    more = (usable - inputs - needed) // block.activations
    return min(layers, fewest + max(0, more))


class StoredBlocks:
    """Decides for each pass."""

    def __init__(
        self, layers: int, block_weights: int, gradient_checkpointing: Checkpointing
    ) -> None:
        """Memory is not known to be short.

        Args:
            layers: Blocks of the decoder.
            block_weights: Weights of the linear layers of a block.
            gradient_checkpointing: As `TrainerSettings` has it: false stores all blocks, true the
                fewest.
        """
        self._layers = layers
        self._block_weights = block_weights
        self._stores_all = not gradient_checkpointing
        self._stores_more = gradient_checkpointing == "partial"
        self._has_stored_more = False

    def fewest(self, slots: int) -> int:
        """Return how many blocks are stored whatever the memory is.

        Args:
            slots: Slots of the pass.
        """
        if self._stores_all:
            return self._layers
        return fewest_stored(self._layers, slots)

    def most(self, slots: int, block_input: torch.Tensor, allocated: int) -> int:
        """Return how many blocks memory has room for, after the first one's forward pass.

        Args:
            slots: Slots of the pass.
            block_input: Of the first block.
            allocated: Bytes that were allocated before its forward pass.
        """
        fewest = self.fewest(slots)
        if not self._stores_more:
            return fewest
        now = allocated_memory(block_input.device)
        assert now is not None
        block = BlockMemory(
            # Never nothing: what is freed meanwhile would count against it.
            activations=max(now - allocated, block_input.nbytes),
            block_input=block_input.nbytes,
            weights=self._block_weights * block_input.element_size(),
        )
        usable = int(USABLE * available_memory()) - allocated
        stored = most_stored(self._layers, slots, block, usable)
        self._has_stored_more |= stored > fewest
        return stored

    def give_up(self) -> bool:
        """Store the fewest from now on; return whether that is less than before."""
        stored_more = self._stores_more and self._has_stored_more
        self._stores_more = False
        return stored_more


def allocated_memory(device: torch.device) -> int | None:
    """Return the bytes that PyTorch has allocated on a GPU; None: it is no GPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.memory_allocated(device)
