"""How many of a decoder's blocks keep their activations (`trainer.gradient_checkpointing`).

A block that keeps them is not computed again for its backward pass: with half of the blocks stored,
half of the time that checkpointing costs is saved. They are the last ones, whose backward pass
comes first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from finetune.config.sections.trainer import Checkpointing
from finetune.model.memory import USABLE, available_memory

WITHIN_PASS = 2
"""Blocks whose activations take at least as much as a backward pass needs within itself."""


def count_fewest(layers: int, slots: int) -> int:
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
    """What the largest block of a pass takes, in bytes."""

    activations: int
    block_input: int
    """Stays of each block, which is computed again from it."""
    weights: int
    """Dequantised: several slots keep those of one block from its second forward pass on."""


def count_most(layers: int, slots: int, block: BlockMemory, usable: int) -> int:
    """Return how many of the blocks may keep their activations in so much memory.

    Args:
        layers: Blocks of the decoder.
        slots: Slots that train together.
        block: Of the largest block in the pass.
        usable: Bytes for all that the blocks allocate.

    Returns:
        A number of blocks, at least `count_fewest`.
    """
    fewest = count_fewest(layers, slots)
    inputs = layers * block.block_input
    needed = (fewest + WITHIN_PASS) * block.activations + block.weights
    more = (usable - inputs - needed) // block.activations
    return min(layers, fewest + max(0, more))


class StoredBlocks:
    """Decides for each pass."""

    def __init__(
        self,
        blocks: Sequence[torch.nn.Module],
        gradient_checkpointing: Checkpointing,
        logits: int,
    ) -> None:
        """Memory is not known to be short.

        Args:
            blocks: Transformers' modules.
            gradient_checkpointing: As `TrainerSettings` has it: false stores all blocks, true the
                fewest.
            logits: Bytes of a chunk of logits, which are there when all activations are.
        """
        self._layers = len(blocks)
        self._block_weights = max(map(count_weights, blocks))
        widths = [_output_columns(block) for block in blocks]
        self._growth = max(widths) / widths[0]
        """How much more the largest block keeps than the first (Gemma 4)."""
        self._stores_all = not gradient_checkpointing
        self._stores_more = gradient_checkpointing == "partial"
        self._has_stored_more = False
        self._logits = logits
        self._recorded_memory = 0

    def begin_pass(self, recorded_memory: int) -> None:
        """Begin a pass that trains.

        Args:
            recorded_memory: Bytes of recorded passes, which others cannot use.
        """
        self._has_stored_more = False
        self._recorded_memory = recorded_memory

    def count_fewest(self, slots: int) -> int:
        """Return how many blocks are stored whatever the memory is.

        Args:
            slots: Slots of the pass.
        """
        if self._stores_all:
            return self._layers
        return count_fewest(self._layers, slots)

    def count_most(self, slots: int, block_input: torch.Tensor, allocated: int) -> int:
        """Return how many blocks memory has room for, after the first one's forward pass.

        Args:
            slots: Slots of the pass.
            block_input: Of the first block.
            allocated: Bytes that were allocated before its forward pass.
        """
        fewest = self.count_fewest(slots)
        if not self._stores_more:
            return fewest
        now = allocated_memory(block_input.device)
        assert now is not None
        # Never nothing: what is freed meanwhile would count against it.
        activations = max(now - allocated, block_input.nbytes)
        block = BlockMemory(
            activations=int(self._growth * activations),
            block_input=block_input.nbytes,
            weights=self._block_weights * block_input.element_size(),
        )
        taken = allocated + self._recorded_memory + self._logits
        usable = int(USABLE * available_memory()) - taken
        stored = count_most(self._layers, slots, block, usable)
        self._has_stored_more = stored > fewest
        return stored

    def give_up(self) -> bool:
        """Store the fewest from now on, if this pass has stored more; return whether it has."""
        if not (self._stores_more and self._has_stored_more):
            return False
        self._stores_more = False
        return True


def count_weights(block: torch.nn.Module) -> int:
    """Return the weights of a block's linear layers."""
    return sum(
        layer.in_features * layer.out_features for layer in _linear_layers(block)
    )


def _output_columns(block: torch.nn.Module) -> int:
    """The columns of all that a block's linear layers compute, of which most is kept."""
    return sum(layer.out_features for layer in _linear_layers(block))


def _linear_layers(block: torch.nn.Module) -> list[torch.nn.Linear]:
    # Quantised layers are linear layers too.
    return [layer for layer in block.modules() if isinstance(layer, torch.nn.Linear)]


def allocated_memory(device: torch.device) -> int | None:
    """Return the bytes that PyTorch has allocated on a GPU; None: it is no GPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.memory_allocated(device)
