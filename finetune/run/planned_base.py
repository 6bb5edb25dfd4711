"""A base with an adapter, without weights: what a plan counts of it in bytes."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.config.schema import RunConfig
from finetune.engine.optimizers import is_plain_adamw, state_bytes
from finetune.engine.packed.backend import supports_gpu_decoder
from finetune.engine.packed.batch import packed_length
from finetune.engine.selection import reason_unsupported
from finetune.errors import refusal
from finetune.model.adapter import add_weightless_adapter
from finetune.model.architectures import text_config_of
from finetune.model.base_config import read_base_config
from finetune.model.base_quantization import base_quantization, read_config_json
from finetune.model.device import on_gpu
from finetune.model.loading import skeleton_of
from finetune.model.memory import resident_memory_bytes
from finetune.model.quantization import compute_dtype
from finetune.model.quantized_layers import expert_weights
from finetune.model.source import BaseSource
from finetune.model.target_modules import modules_outside_language_model
from finetune.run.cpu_activations import cpu_activations
from finetune.run.decoder_memory import RecordedMemory, StoredMemory, block_weights
from finetune.run.device_memory import Activations, DeviceMemory
from finetune.run.expert_costs import expert_bytes, expert_shape
from finetune.run.memory_costs import (
    adapted_layers,
    base_bytes,
    expert_buffer_bytes,
    gpu_activations,
)
from finetune.run.planned_work import Work
from finetune.run.stages import Stage, borrowing_stages, read_stages

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel

ADAMW_BYTES = 2 * 4
"""AdamW keeps two averages of each weight's gradient, in float32."""

LIBRARIES = 100 * 2**20
"""Bytes of its libraries that a run on a CPU pages in once it computes."""


@dataclass(frozen=True)
class PlannedBase:
    """Shapes and sizes of a base, and of an adapter on it."""

    config: RunConfig
    """The run's."""
    base_config: "PreTrainedConfig"
    adapted: "PeftModel"
    """The adapter on the base, both without weights."""
    skeleton: "PreTrainedModel"
    """The base in it."""
    size: int
    """Bytes of the base."""
    experts: int
    """Bytes of fused experts that are not quantised."""
    expert_buffer: int
    """Bytes of the experts that are dequantised at once."""
    weights: int
    """Weights that each token is multiplied by."""
    stages: list[Stage]
    """One for each device."""
    borrowing: list[Stage]
    """The same where each GPU computes all blocks for its own slots; none: it can't be."""

    @classmethod
    def read(cls, source: BaseSource, config: RunConfig) -> "PlannedBase":
        """Read a base's config and shapes.

        Args:
            source: Where it is.
            config: The run's config, with its quantization decided.

        Raises:
            ConfigError: It can't be read, or has no attention heads, so that its activations are
                not known.
        """
        base_config = read_base_config(source, config.model)
        if getattr(text_config_of(base_config), "num_attention_heads", None) is None:
            name = config.model.name_or_path
            reason = "no plan for a model without attention heads"
            raise refusal("model.name_or_path", name, reason)
        skeleton = skeleton_of(base_config, config.model)
        files = base_quantization(read_config_json(source))
        # Before the adapter's weights stand in the skeleton.
        size = base_bytes(skeleton, config, files)
        experts = expert_bytes(skeleton, config, files)
        expert_buffer = expert_buffer_bytes(skeleton, config, files)
        weights = _multiplied_weights(skeleton)
        stages = read_stages(skeleton, config, files)
        borrowing = borrowing_stages(stages, skeleton, config, files)
        adapted = add_weightless_adapter(skeleton, config.lora)
        return cls(
            config=config,
            base_config=base_config,
            adapted=adapted,
            skeleton=skeleton,
            size=size,
            experts=experts,
            expert_buffer=expert_buffer,
            weights=weights,
            stages=stages,
            borrowing=borrowing,
        )

    def devices(self, work: Work) -> tuple[DeviceMemory, ...]:
        """Return what a run needs of each device.

        Args:
            work: The run's batches.
        """
        return tuple(self._device(stage, work) for stage in self.stages)

    def borrowing_devices(self, work: Work) -> tuple[DeviceMemory, ...]:
        """Return the same where each GPU computes all blocks for slots of its own.

        Args:
            work: The run's batches.

        Returns:
            Each GPU's, with the bytes of each slot that is there; none where it can't be.
        """
        if self._targets is None:
            return ()
        return tuple(self._device(stage, work) for stage in self.borrowing)

    def _device(self, stage: Stage, work: Work) -> DeviceMemory:
        config = self.config
        shapes = self._trained_shapes
        trained = sum(map(math.prod, shapes))
        adapter = trained * stage.bytes_per_trained_weight(config, self._half_precision)
        held = 0
        recorded = stored = None
        if self._targets is not None:
            held = block_weights(self._shapes, config) * self._element_bytes
        # What several GPUs compute is not recorded, and their fewest blocks are stored.
        if self._targets is not None and len(self.stages) == 1:
            size = self._element_bytes
            recorded = RecordedMemory.read(self._shapes, size)
            stored = StoredMemory.read(self._shapes, config, self._targets, size)
        return DeviceMemory(
            process=0 if on_gpu() else _resident() + LIBRARIES,
            base=math.ceil(self.size * stage.base_share) + self.expert_buffer,
            experts=math.ceil(self.experts * stage.base_share),
            adapter=math.ceil(adapter),
            optimizer=_optimizer_bytes(shapes, config) if stage.is_first else 0,
            activations=self._activations(stage, work),
            batch_tokens=max(work.batches),
            held=held,
            recorded=recorded,
            stored=stored,
            borrowed=stage.borrowed,
        )

    def _activations(self, stage: Stage, work: Work) -> Activations:
        if on_gpu():
            return gpu_activations(
                self._shapes,
                self.config,
                self._targets,
                self._element_bytes,
                max(work.batches),
                packed_length(work.evaluated_rows),
                self.skeleton,
                stage.blocks,
                stage.has_head,
            )
        is_trl = reason_unsupported(self.config, self.base_config) is not None
        is_trl |= self.config.trainer.engine == "trl"
        return cpu_activations(
            self.config,
            self._shapes,
            self.adapted,
            work.largest_rows,
            work.evaluated_rows,
            is_trl,
        )

    @property
    def _shapes(self) -> Any:
        """The base's text config."""
        return text_config_of(self.base_config)

    @functools.cached_property
    def _trained_shapes(self) -> list[tuple[int, ...]]:
        weights = self.adapted.parameters()
        return [tuple(weight.shape) for weight in weights if weight.requires_grad]

    @property
    def _half_precision(self) -> bool:
        """Whether a GPU computes in 16 bits."""
        return on_gpu() and compute_dtype(self.config.quantization).itemsize == 2

    @property
    def _element_bytes(self) -> int:
        return 2 if self._half_precision else 4

    @functools.cached_property
    def _targets(self) -> set[str] | None:
        """Names of the adapted layers where the GPU's decoder computes; None: autograd does."""
        if not supports_gpu_decoder(self.base_config, self.config.quantization):
            return None
        return adapted_layers(self.adapted)


def _optimizer_bytes(shapes: Sequence[tuple[int, ...]], config: RunConfig) -> int:
    """Bytes of the optimizer's state for trained weights of these shapes."""
    if is_plain_adamw(config):
        return sum(map(math.prod, shapes)) * ADAMW_BYTES
    return state_bytes(shapes, config)


def _multiplied_weights(skeleton: "PreTrainedModel") -> int:
    """Weights that a token is multiplied by: without the embedding, and most of the experts."""
    outside = tuple(f"{name}." for name in modules_outside_language_model(skeleton))
    experts = expert_shape(skeleton, 1)
    of_experts = expert_weights(skeleton)
    weights = 0.0
    for name, weight in skeleton.named_parameters():
        if "embed" in name or name.startswith(outside):
            continue
        is_routed = experts is not None and name in of_experts
        share = experts.pairs / experts.experts if experts and is_routed else 1
        weights += share * weight.numel()
    return int(weights)


@functools.cache
def _resident() -> int:
    """Memory of this process when it first plans: libraries imported, no base loaded."""
    return resident_memory_bytes()
