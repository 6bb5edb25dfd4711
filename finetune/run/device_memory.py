"""What a run needs in the memory of one device, in bytes by what it is for."""

from dataclasses import dataclass

from finetune.run.decoder_memory import RecordedMemory, StoredMemory


@dataclass(frozen=True)
class BackwardMemory:
    """Activations of a batch, for its backward pass."""

    stored: int
    """From the forward pass."""
    passing: int
    """Needed within the backward pass."""

    @property
    def peak(self) -> int:
        """The most at once."""
        return self.stored + self.passing


@dataclass(frozen=True)
class Activations:
    """Of a run's largest batch."""

    single: BackwardMemory
    """When no other slot is computed with it."""
    packed: BackwardMemory
    """When others are."""
    logits: int
    """One chunk of logits; on a CPU what it takes beyond the backward pass of a layer, which comes
    when the logits are freed."""
    evaluating: int
    """Of the largest batch of held-out rows: without a backward pass, beyond `logits`."""


@dataclass(frozen=True)
class DeviceMemory:
    """Of a GPU, or of the host where there is none."""

    process: int
    """Python and its libraries, where memory is the host's."""
    base: int
    """The frozen base's blocks that are here, with embedding and output layer if these are."""
    experts: int
    """Of the base: fused experts, which stay in 16 bits in a quantised base."""
    adapter: int
    """One slot's weights, gradient, rounded copy, and the sum of the gradients of several batches;
    on later GPUs the copy and the gradient of what is there."""
    optimizer: int
    """One slot's optimizer state; 0 on later GPUs, unless they have slots of their own."""
    activations: Activations
    batch_tokens: int
    """Of the training batch that the activations are of."""
    held: int
    """Dequantised weights of one block, kept where several slots train with checkpointing."""
    recorded: RecordedMemory | None
    """Of recorded passes; None: there are none."""
    stored: StoredMemory | None
    """Of blocks that keep their activations where memory allows; None: there are none."""
    borrowed: int = 0
    """Room for two blocks that live on other GPUs, where this one computes all blocks."""

    def peak(
        self,
        slots: int,
        group: int,
        tokens: float,
        group_tokens: float,
        limit: float = 0,
    ) -> int:
        """Return the most bytes at once, while slots train or evaluate.

        Args:
            slots: That train or are evaluated on the device.
            group: Of these, how many are computed together.
            tokens: In the largest passes of all slots.
            group_tokens: The same of one group: groups are in different blocks at a time.
            limit: Bytes up to which blocks keep their activations; 0: the fewest blocks do.
        """
        activations = self.activations
        training = activations.single if group == 1 else activations.packed
        all_tokens = training.stored * tokens + training.passing * group_tokens
        rows = all_tokens / self.batch_tokens
        if group > 1:
            rows += self.held
        throughout = self._throughout(slots)
        if self._is_recorded(tokens):
            assert self.recorded is not None
            rows += self.recorded.size(tokens)
        elif self.stored is not None:
            usable = limit - throughout - activations.logits
            rows += self.stored.additional_bytes(slots, tokens, usable)
        # Of several groups an upper bound: one at a time is in the blocks that are here.
        rows = max(rows, slots * activations.evaluating)
        return int(throughout + activations.logits + rows)

    def stored_share(self, slots: int, tokens: float, limit: float) -> float:
        """Return the share of the blocks that keep their activations, where memory decides it.

        Args:
            slots: That train together.
            tokens: In a pass.
            limit: Bytes that may be allocated.
        """
        if self.stored is None:
            return 1.0
        usable = 0.0
        # Recorded passes store the fewest.
        if not self._is_recorded(tokens):
            usable = limit - self._throughout(slots) - self.activations.logits
        return self.stored.count_layers(slots, tokens, usable) / self.stored.layers

    def _throughout(self, slots: int) -> int:
        """What is there between passes too."""
        of_slots = slots * (self.adapter + self.optimizer)
        return self.process + self.base + self.borrowed + of_slots

    def _is_recorded(self, tokens: float) -> bool:
        return self.recorded is not None and self.recorded.size(tokens) > 0
