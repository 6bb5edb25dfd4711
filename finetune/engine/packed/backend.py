"""What computes the decoder of a base for all slots: hand-written GPU kernels, or autograd."""

import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from finetune.config.schema import QuantizationSettings, RunConfig
from finetune.console import summary_line
from finetune.engine.packed.batch import PackedBatch
from finetune.engine.packed.slot import Slot
from finetune.model.architectures import LLAMA_LIKE
from finetune.model.device import newer_gpu
from finetune.model.quantization import compute_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from finetune.engine.packed.gpu.decoder import Decoder


log = logging.getLogger(__name__)


class Backend(Protocol):
    """What takes the slots' tokens through the base: forward, backward, and what is made of some logits."""

    logits_chunk: int

    def forward(
        self, line: PackedBatch, slots: Sequence[Slot], draws: Sequence[int] | None
    ) -> tuple[torch.Tensor, Any]: ...

    def backward(self, trace: Any, gradient: torch.Tensor) -> None: ...

    def score(
        self, logits: torch.Tensor, targets: torch.Tensor, learns: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]: ...


def supports_gpu_decoder(shapes: "PreTrainedConfig", quantization: QuantizationSettings) -> bool:
    """Whether a base's decoder can be computed by hand.

    That is of a Llama-like base, on a GPU of compute capability 8 or more on which Triton works, in 16 bits, without
    8-bit products, with SwiGLU, and with heads whose blocks have room in its multiprocessors.
    """
    if shapes.model_type not in LLAMA_LIKE:  # others may lack the sizes that are read here
        return False
    heads = getattr(shapes, "head_dim", None) or shapes.hidden_size // shapes.num_attention_heads
    return (
        newer_gpu(torch.device("cuda"))
        and compute_dtype(quantization).itemsize == 2
        and not quantization.load_in_8bit
        and shapes.hidden_act in ("silu", "swish")
        and heads <= 128
        and _kernels_work()
    )


@functools.cache
def _kernels_work() -> bool:
    """Triton may be missing, or the C compiler that it needs to start kernels."""
    try:
        from finetune.engine.packed.gpu import kernels

        kernels.gate(*torch.zeros(2, 16, device="cuda", dtype=torch.bfloat16))
    except Exception as error:
        log.warning(
            "the GPU's kernels can't be built: training by PyTorch's own, slower operations (%s)", summary_line(error)
        )
        return False
    return True


def gpu_decoder(base: "PreTrainedModel", config: RunConfig) -> "Decoder | None":
    """The decoder of a base, where it can be computed so."""
    plain = type(base).__module__.startswith("transformers.")  # no remote code, which may mean something else
    if not plain or not supports_gpu_decoder(base.config, config.quantization):
        return None
    from finetune.engine.packed.gpu.decoder import Decoder

    return Decoder(base, config.trainer.gradient_checkpointing is True)
