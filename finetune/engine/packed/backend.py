"""The interface of a backend, and the choice between the two: GPU kernels or autograd."""

import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from finetune.compat import begin_triton_key
from finetune.config.schema import RunConfig
from finetune.config.sections.model import QuantizationSettings
from finetune.console import summary_line
from finetune.engine.packed.batch import PackedBatch
from finetune.engine.packed.gpu.borrowed_blocks import reason_not_borrowed
from finetune.engine.packed.pipeline import PassSteps
from finetune.engine.packed.slot import Slot
from finetune.model.decoder_blocks import decoder_block_of
from finetune.model.device import is_ampere_or_later
from finetune.model.layer_devices import count_stages
from finetune.model.quantization import compute_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from finetune.engine.packed.gpu.decoder import Decoder


log = logging.getLogger(__name__)


class Backend(Protocol):
    """Takes the tokens of all slots through the frozen base and the slots' adapters.

    Implemented by `autograd_backend.AutogradBackend` and, on a GPU, by `gpu.decoder.Decoder`.
    The bank computes the output embedding (the head) and the loss between forward and backward.
    """

    logits_chunk: int
    """Answer tokens whose logits are in memory at once."""
    borrows_blocks: bool
    """Whether each GPU of a spread base computes all blocks for slots of its own."""

    def attach(self, slot: Slot) -> None:
        """Prepare for the adapters of a new slot."""

    def forward(
        self,
        batch: PackedBatch,
        slots: Sequence[Slot],
        dropout_steps: Sequence[int] | None,
    ) -> PassSteps[tuple[torch.Tensor, Any]]:
        """Compute the last hidden state at each position that predicts an answer token.

        The embeddings are computed by the call itself, the rest by the steps.

        Args:
            batch: The tokens of all slots.
            slots: One for each of `batch.batch_spans`.
            dropout_steps: The batch number of each slot, which seeds its dropout masks; None for
                evaluation: no dropout, and nothing is kept for a backward pass.

        Returns:
            Steps, whose result are the hidden states [answer tokens, hidden_size], and the trace
            that `backward` takes.
        """

    def backward(self, trace: Any, gradient: torch.Tensor) -> PassSteps[None]:
        """Replace the gradients of the slots' adapters (`slot.gradient`), in steps.

        Args:
            trace: From `forward`.
            gradient: Gradient of the hidden states [answer tokens, hidden_size].
        """

    def release_memory(self, trains: bool) -> str | None:
        """Let go of memory that only makes passes faster.

        Args:
            trains: Whether a pass that trains needs it.

        Returns:
            The change, for users; None: there was none.
        """

    def score(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        with_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Compute the cross-entropy of logits; the logits may be overwritten.

        Args:
            logits: [tokens, vocabulary].
            targets: The answer tokens [tokens].
            with_gradient: Compute the gradient too.

        Returns:
            Negative log-likelihoods in nats, float32 [tokens]; whether each target is the most
            likely token [tokens] (meaningless with a gradient); with a gradient, that of each
            token's loss with respect to its logits [tokens, vocabulary], else None.
        """


def supports_gpu_decoder(
    shapes: "PreTrainedConfig", quantization: QuantizationSettings
) -> bool:
    """Whether the GPU kernels can compute a base's decoder.

    They need a decoder of known blocks (`model.decoder_blocks`), products in 16 bits, and a GPU of
    compute capability 8 or more on which Triton works.

    Args:
        shapes: The base's config.
        quantization: Settings of the base's quantization.
    """
    return (
        decoder_block_of(shapes) is not None
        and is_ampere_or_later(torch.device("cuda"))
        and compute_dtype(quantization).itemsize == 2
        and not quantization.load_in_8bit
        and _kernels_work()
    )


@functools.cache
def _kernels_work() -> bool:
    """Try one kernel: Triton may be missing, or the C compiler that it needs to launch kernels."""
    try:
        from finetune.engine.packed.gpu.gated_product import gated_product

        begin_triton_key().join()
        gate, up = torch.zeros(2, 1, 16, device="cuda", dtype=torch.bfloat16)
        gated_product(gate, up, "silu")
    except Exception as error:
        log.warning(
            "the GPU kernels cannot be compiled; training with PyTorch's slower operations (%s)",
            summary_line(error),
        )
        return False
    return True


def gpu_decoder(
    base: "PreTrainedModel", config: RunConfig, borrows_blocks: bool
) -> "Decoder | None":
    """Build the GPU decoder of a base; None where the kernels do not support it.

    Args:
        base: The loaded base.
        config: The config of any run on this base.
        borrows_blocks: As `Plan.borrows_blocks` decides.
    """
    # Remote code may give the modules another meaning.
    is_transformers_model = type(base).__module__.startswith("transformers.")
    if not is_transformers_model:
        return None
    if not supports_gpu_decoder(base.config, config.quantization):
        return None
    from finetune.engine.packed.gpu.decoder import Decoder

    reason = reason_not_borrowed(base) if borrows_blocks else None
    if borrows_blocks and reason is None:
        log.info(
            "each GPU computes all blocks for its own slots, with borrowed weights"
        )
    elif count_stages(base) > 1:
        because = "" if reason is None else f", as the base has {reason}"
        log.info(
            "the GPUs compute their blocks for groups of slots in turns%s", because
        )
    return Decoder(
        base, config.trainer.checkpointing, borrows_blocks and reason is None
    )
