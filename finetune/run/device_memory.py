"""What a run needs in the memory of one device, in bytes by what it is for."""

from dataclasses import dataclass

from finetune.engine.packed.turns import group_size
from finetune.run.decoder_memory import RecordedMemory


@dataclass(frozen=True)
class BackwardMemory:
    """Activations of a batch, for its backward pass."""

    kept: int
    """From the forward pass."""
    passing: int
    """Needed within the backward pass."""

    @property
    def peak(self) -> int:
        """The most at once."""
        return self.kept + self.passing


@dataclass(frozen=True)
class Activations:
    """Of a run's largest batch, by what it is computed with."""

    alone: BackwardMemory
    beside: BackwardMemory
    """When other slots are computed with it."""
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
    """The blocks of the frozen base that are here."""
    experts: int
    """Of the base: fused experts, which stay in 16 bits in a quantised base."""
    adapter: int
    """One slot's weights, gradient, rounded copy, and the sum of the gradients of several
    batches."""
    optimizer: int
    """One slot's optimizer state."""
    activations: Activations
    batch_tokens: int
    """Of the training batch that the activations are of."""
    held: int
    """Dequantised weights of one block, kept where several slots train with checkpointing."""
    recorded: RecordedMemory | None
    """Of recorded passes; None: there are none."""

    def peak(self, slots: int, gpus: int, tokens: float, group_tokens: float) -> int:
        """Return the most bytes that slots need at once, while they train or evaluate.

        Args:
            slots: That train or are evaluated.
            gpus: Over which the base is spread.
            tokens: In the largest passes of all slots.
            group_tokens: The same of one group of slots: groups take turns within their passes.
        """
        together = group_size(slots, gpus)
        activations = self.activations
        training = activations.alone if together == 1 else activations.beside
        all_tokens = training.kept * tokens + training.passing * group_tokens
        rows = all_tokens / self.batch_tokens
        if together > 1:
            rows += self.held
        if self.recorded is not None:
            rows += self.recorded.size(tokens)
        rows = max(rows, together * activations.evaluating)
        adapters = slots * (self.adapter + self.optimizer)
        return int(self.process + self.base + activations.logits + adapters + rows)
