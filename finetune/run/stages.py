"""What each of several GPUs has of a base and its adapters, as a plan counts it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.config.schema import RunConfig
from finetune.engine.packed.gpu.borrowed_blocks import BUFFERS
from finetune.engine.packed.gpu.stored_blocks import count_weights
from finetune.model.base_quantization import (
    BITSANDBYTES,
    DEQUANTIZED,
    BaseQuantization,
    is_quantized_again,
)
from finetune.model.device import spread_gpus
from finetune.model.layer_devices import WeightBytes
from finetune.model.loading import place
from finetune.model.quantization import compute_dtype
from finetune.run.memory_costs import bytes_per_weight, quantized_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Stage:
    """What one of the GPUs has that a base is spread over, or the only device has."""

    base_share: float = 1.0
    """Of the base's bytes."""
    blocks: range | None = None
    """None: all."""
    blocks_share: float = 1.0
    is_first: bool = True
    """Whether it has the slots' exact weights and their optimizers."""
    has_head: bool = True
    borrowed: int = 0
    """Bytes for blocks that live on other GPUs, where this one computes all blocks."""

    def bytes_per_trained_weight(
        self, config: RunConfig, half_precision: bool
    ) -> float:
        """Return the bytes for each weight of an adapter: copies, gradients and their sums."""
        if not self.is_first:
            copied = 2 if half_precision else 4
            return self.blocks_share * (copied + 4)
        size = 4.0 + 4
        if half_precision:
            size += 2 * self.blocks_share
        if config.trainer.gradient_accumulation_steps > 1:
            size += 4  # the sum of the batches' gradients
        return size


def borrowing_stages(
    stages: Sequence[Stage],
    skeleton: "PreTrainedModel",
    config: RunConfig,
    files: BaseQuantization | None,
) -> list[Stage]:
    """Return what each GPU has where each computes all blocks for its own slots.

    Args:
        stages: From `read_stages`.
        skeleton: The base without weights, and without an adapter.
        config: The run's config.
        files: The quantization of the base's files.

    Returns:
        The stages; none where no weights are borrowed (`reason_not_borrowed` of a loaded base).
    """
    has_plain_or_4bit_weights = (
        files is None or files.method in BITSANDBYTES | DEQUANTIZED
    )
    is_in_8_bits = config.quantization.load_in_8bit
    if len(stages) == 1 or is_in_8_bits or not has_plain_or_4bit_weights:
        return []
    quantized = quantized_weights(skeleton, config, files)
    matrix = bytes_per_weight(quantized, config, files)
    blocks = skeleton.get_decoder().layers
    borrowed = math.ceil(BUFFERS * matrix * max(map(count_weights, blocks)))
    return [
        Stage(base_share=stage.base_share, has_head=stage.has_head, borrowed=borrowed)
        for stage in stages
    ]


def read_stages(
    skeleton: "PreTrainedModel", config: RunConfig, files: BaseQuantization | None
) -> list[Stage]:
    """Read what each device will have.

    Args:
        skeleton: The base without weights, and without an adapter.
        config: The run's config.
        files: The quantization of the base's files.
    """
    gpus = spread_gpus(config.trainer.gpus)
    if gpus == 1:
        return [Stage()]
    is_requantized = is_quantized_again(files, config.quantization)
    other = compute_dtype(config.quantization).itemsize
    placement = place(skeleton, config, None if is_requantized else files, gpus)
    # As `base_bytes` counts them.
    quantized = quantized_weights(skeleton, config, files)
    matrix = bytes_per_weight(quantized, config, files)
    shares = placement.shares(skeleton, WeightBytes(matrix, other))
    stages = []
    for gpu, share in enumerate(shares):
        blocks = placement.blocks_on(gpu)
        stage = Stage(
            base_share=share,
            blocks=blocks,
            blocks_share=len(blocks) / len(placement.blocks),
            is_first=gpu == 0,
            has_head=gpu == placement.head,
        )
        stages.append(stage)
    return stages
