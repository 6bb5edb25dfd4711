"""What a packed run asks the bank to compute, and what the bank returns."""

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.engine.evaluation import Evaluation
from finetune.engine.packed.batch import Row
from finetune.engine.packed.slot import Slot
from finetune.engine.steps import Executor


@dataclass(frozen=True)
class ForwardBackward:
    """A run's wish: the gradient of a batch's loss, the sum over its answers' tokens times `share`."""

    slot: Slot
    rows: Sequence[Row]
    loss_weight: float
    """1 / the number of the optimizer step's answer tokens; times the loss scale, where there is one."""
    dropout_step: int
    """Counts the run's batches: names the batch's dropout masks."""

    @property
    def executor(self) -> Executor:
        """The bank that the slot is on."""
        return self.slot.bank


@dataclass(frozen=True)
class ForwardBackwardResult:
    """What came of a batch; its gradient is in the slot."""

    loss: float
    """Sum of its answers' tokens' negative log-likelihoods, in nats."""
    norm: float
    """The gradient's, the loss scale in it."""
    seconds: float
    """That the batch took, all slots' together."""


@dataclass(frozen=True)
class Evaluate:
    """A run's wish: what its adapter makes of some rows."""

    slot: Slot
    rows: Sequence[Row]

    @property
    def executor(self) -> Executor:
        """The bank that the slot is on."""
        return self.slot.bank


PackedRequest = ForwardBackward | Evaluate


Response = ForwardBackwardResult | Evaluation
