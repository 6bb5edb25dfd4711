"""The requests that a packed run yields, and the bank's responses.

`sweeps.study.pack` decides which are executed together; `Bank.execute` executes them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finetune.engine.encoded_prompts import Answers, EncodedPrompts
from finetune.engine.evaluation import Evaluation
from finetune.engine.packed.batch import BatchLayout, Row
from finetune.engine.packed.gradient_norms import GradientNorm
from finetune.engine.packed.pass_figures import PassFigures
from finetune.engine.packed.slot import Slot
from finetune.engine.steps import Executor


@dataclass(frozen=True)
class ForwardBackward:
    """Request the gradient of one batch's loss.

    The loss is the sum of the answer tokens' negative log-likelihoods times `loss_weight`.
    """

    slot: Slot
    rows: Sequence[Row]
    loss_weight: float
    """1 / (answer tokens of the whole optimizer step), times the float16 loss scale if any."""
    dropout_step: int
    """Number of the batch within the run; seeds the batch's dropout masks."""
    rounds_to_answers: int | None = None
    """See `Request.rounds_to_answers`."""
    noise_alpha: float | None = None
    """Alpha of NEFTune's noise on the embeddings; None: no noise."""
    layout: BatchLayout | None = None
    """The rows' layout, with groups of `group_size`; None: the bank lays them out."""
    prepare_next: Callable[[], None] | None = None
    """Called while a GPU computes: prepares the run's next batch."""

    @property
    def group_size(self) -> int | None:
        """See `Evaluate.group_size`. Each row has noise of its own, on its prefix too."""
        return None if self.noise_alpha is None else 1

    @property
    def executor(self) -> Executor:
        """The bank that the slot is on."""
        return self.slot.bank


@dataclass(frozen=True)
class ForwardBackwardResult:
    """Loss and gradient norm of one batch. The gradient itself is left in `slot.gradient`.

    On a GPU `loss`, `norm` and `seconds` wait until the pass has been computed.
    """

    figures: PassFigures
    """Of the pass, all slots together."""
    index: int
    """Of the slot among those of the pass."""

    @property
    def loss(self) -> float:
        """Sum of the answer tokens' negative log-likelihoods, in nats; not weighted."""
        return self.figures.of_slot(self.index)[0]

    @property
    def norm(self) -> float:
        """2-norm of the gradient, with the loss weight."""
        return self.figures.of_slot(self.index)[1]

    @property
    def device_norm(self) -> GradientNorm:
        """`norm` on the device."""
        return self.figures.norms.of_slot(self.index)

    @property
    def seconds(self) -> float:
        """Duration of the pass, all slots together."""
        return self.figures.seconds()


@dataclass(frozen=True)
class Evaluate:
    """Request the losses of rows under the slot's adapter."""

    slot: Slot
    rows: Sequence[Row]
    group_size: int | None = None
    """Each so many rows share a beginning of their own; None: all rows are one group."""
    rounds_to_answers: int | None = None
    """See `Request.rounds_to_answers`."""

    @property
    def executor(self) -> Executor:
        """The bank that the slot is on."""
        return self.slot.bank


@dataclass(frozen=True)
class Generate:
    """Request the answers to prompts under the slot's adapter."""

    slot: Slot
    prompts: EncodedPrompts

    @property
    def executor(self) -> Executor:
        """The bank that the slot is on."""
        return self.slot.bank

    @property
    def rounds_to_answers(self) -> int:
        """See `Request.rounds_to_answers`."""
        return 0


@dataclass(frozen=True)
class Wait:
    """Request nothing, while a thread of the run prepares its request for answers.

    Its response is None. Other runs' requests for answers wait for it.
    """

    slot: Slot

    @property
    def executor(self) -> Executor:
        """The bank that the slot is on."""
        return self.slot.bank

    @property
    def rounds_to_answers(self) -> int:
        """See `Request.rounds_to_answers`."""
        return 1


PackedRequest = ForwardBackward | Evaluate | Generate | Wait


Response = ForwardBackwardResult | Evaluation | Answers | None
