"""The memory that a run will need, computed before any weights load.

`python -m finetune.plan` prints it; runs use it to decide `trainer.gradient_checkpointing=auto`,
studies to decide the number of slots.
"""

import dataclasses
import functools
import heapq
import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from finetune.config.schema import RunConfig
from finetune.config.sections.trainer import Checkpointing
from finetune.data.lengths import computed_length
from finetune.data.token_file import Example
from finetune.engine.optimizers import is_plain_adamw, state_bytes
from finetune.engine.packed.backend import supports_gpu_decoder
from finetune.engine.packed.batch import packed_length
from finetune.engine.schedule import step_batches, total_steps
from finetune.engine.selection import answers_together, reason_unsupported
from finetune.errors import refusal
from finetune.model.adapter import add_adapter
from finetune.model.architectures import text_config_of
from finetune.model.base_config import read_base_config
from finetune.model.base_quantization import (
    BaseQuantization,
    base_quantization,
    is_quantized_again,
    read_config_json,
)
from finetune.model.device import on_gpu, spread_gpus
from finetune.model.layer_devices import WeightBytes
from finetune.model.loading import place, skeleton_of
from finetune.model.memory import available_memory, resident_memory_bytes
from finetune.model.quantization import compute_dtype, require_bitsandbytes
from finetune.model.quantized_layers import expert_weights
from finetune.model.target_modules import modules_outside_language_model
from finetune.run.cpu_activations import cpu_activations
from finetune.run.decoder_memory import RecordedMemory, StoredMemory, block_weights
from finetune.run.device_memory import Activations, DeviceMemory
from finetune.run.expert_costs import expert_bytes, expert_shape
from finetune.run.memory_costs import (
    adapted_layers,
    base_bytes,
    bytes_per_weight,
    expert_buffer_bytes,
    gpu_activations,
    quantized_weights,
)
from finetune.run.plan import Plan
from finetune.run.quantization import resolve_quantization
from finetune.run.resources import SharedResources, base_key

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

ADAMW_BYTES = 2 * 4
"""AdamW keeps two averages of each weight's gradient, in float32."""

LIBRARIES = 100 * 2**20
"""Bytes of its libraries that a run on a CPU pages in once it computes."""


MOST_SHAPED = 16
"""Batches whose activations are computed on a CPU: the largest ones."""

MOST_COUNTED = 5000
"""Training batches whose tokens are counted exactly: reading the rows of more takes seconds."""

LARGEST_COUNTED = 100
"""The largest of the other batches are counted too."""


def resolve_checkpointing(
    config: RunConfig,
    engine: str,
    resources: SharedResources,
    checkpointed_bases: Sequence[object] = (),
) -> RunConfig:
    """Decide `trainer.gradient_checkpointing=auto`.

    It becomes partial where the activations would not fit otherwise. Of TRL's runs, whose memory is
    not planned, it becomes false.

    Args:
        config: The run's config.
        engine: packed or trl.
        resources: Share rows and tokens.
        checkpointed_bases: Keys (`base_key`) of bases on which it is partial for all runs.

    Returns:
        The config with partial or false.
    """
    if config.trainer.gradient_checkpointing != "auto":
        return config
    without = _with_checkpointing(config, False)
    checkpointed = _with_checkpointing(config, "partial")
    if engine != "packed":
        return without
    if base_key(checkpointed) in checkpointed_bases:
        log.info("trainer.gradient_checkpointing=partial: as for all jobs on this base")
        return checkpointed
    if plan_memory(without, resources).largest:
        return without
    plan = plan_memory(checkpointed, resources)
    # It may fit although it leaves less free than plans do.
    if plan.need() > plan.available:
        return without  # does not fit either way: slower training would gain nothing
    log.info(
        "trainer.gradient_checkpointing=partial: the activations would not fit otherwise"
    )
    return checkpointed


def _with_checkpointing(config: RunConfig, value: Checkpointing) -> RunConfig:
    trainer = dataclasses.replace(config.trainer, gradient_checkpointing=value)
    return dataclasses.replace(config, trainer=trainer)


def plan_memory(config: RunConfig, resources: SharedResources) -> Plan:
    """Plan a run from its config, its rows and its base's shapes; no weights are loaded.

    Raises:
        ConfigError: The base or the rows can't be read, bitsandbytes is missing, or the base has no
            attention heads, so that its activations are not known.
    """
    source = resources.source(config.model)
    config = resolve_quantization(config, resources)
    require_bitsandbytes(config.quantization)
    work = _count_work(config, resources)
    base_config = read_base_config(source, config.model)
    shapes = text_config_of(base_config)
    if getattr(shapes, "num_attention_heads", None) is None:
        name = config.model.name_or_path
        raise refusal(
            "model.name_or_path", name, "no plan for a model without attention heads"
        )
    skeleton = skeleton_of(base_config, config.model)
    weights = _multiplied_weights(skeleton)
    files = base_quantization(read_config_json(source))
    experts = expert_bytes(skeleton, config, files)
    # Before the adapter's weights stand in the skeleton.
    base = base_bytes(skeleton, config, files)
    expert_buffer = expert_buffer_bytes(skeleton, config, files)
    stages = _stages(skeleton, config, files)
    with torch.device("meta"):  # the drawn values are not read
        adapted = add_adapter(skeleton, config.lora, config.seed)
    shapes_trained = [
        tuple(weight.shape) for weight in adapted.parameters() if weight.requires_grad
    ]
    trained = sum(map(math.prod, shapes_trained))
    half_precision = on_gpu() and compute_dtype(config.quantization).itemsize == 2
    element_bytes = 2 if half_precision else 4
    uses_decoder = supports_gpu_decoder(base_config, config.quantization)
    largest = max(work.batches)
    targets = adapted_layers(adapted) if uses_decoder else None
    held = block_weights(shapes, config) * element_bytes if uses_decoder else 0
    recorded = stored = None
    # What several GPUs compute is not recorded, and their fewest blocks are stored.
    if targets is not None and len(stages) == 1:
        recorded = RecordedMemory.read(shapes, element_bytes)
        stored = StoredMemory.read(shapes, config, targets, element_bytes)

    def activations_of(stage: _Stage) -> Activations:
        if on_gpu():
            return gpu_activations(
                shapes,
                config,
                targets,
                element_bytes,
                largest,
                packed_length(work.evaluated_rows),
                skeleton,
                stage.blocks,
                stage.has_head,
            )
        is_trl = reason_unsupported(config, base_config) is not None
        is_trl |= config.trainer.engine == "trl"
        rows = (work.largest_rows, work.evaluated_rows)
        return cpu_activations(config, shapes, adapted, *rows, is_trl)

    devices = [
        DeviceMemory(
            process=0 if on_gpu() else _resident() + LIBRARIES,
            base=math.ceil(base * stage.base_share) + expert_buffer,
            experts=math.ceil(experts * stage.base_share),
            adapter=math.ceil(
                trained * stage.bytes_per_trained_weight(config, half_precision)
            ),
            optimizer=(
                _optimizer_bytes(shapes_trained, config) if stage.is_first else 0
            ),
            activations=activations_of(stage),
            batch_tokens=largest,
            held=held,
            recorded=recorded,
            stored=stored,
        )
        for stage in stages
    ]
    return Plan(
        devices=tuple(devices),
        available=available_memory(len(stages)),
        batches=work.batches,
        train_tokens=work.train_tokens,
        weights=weights,
        answers_together=answers_together(config, base_config),
    )


@dataclass(frozen=True)
class _Stage:
    """What one of the GPUs has that a base is spread over, or the only device has."""

    base_share: float = 1.0
    """Of the base's bytes."""
    blocks: range | None = None
    """None: all."""
    blocks_share: float = 1.0
    is_first: bool = True
    """Whether it has the slots' exact weights and their optimizers."""
    has_head: bool = True

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


def _stages(
    skeleton: "PreTrainedModel", config: RunConfig, files: BaseQuantization | None
) -> list[_Stage]:
    gpus = spread_gpus(config.trainer.gpus)
    if gpus == 1:
        return [_Stage()]
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
        stage = _Stage(
            base_share=share,
            blocks=blocks,
            blocks_share=len(blocks) / len(placement.blocks),
            is_first=gpu == 0,
            has_head=gpu == placement.head,
        )
        stages.append(stage)
    return stages


def _optimizer_bytes(shapes: Sequence[tuple[int, ...]], config: RunConfig) -> int:
    """Bytes of the optimizer's state for trained weights of these shapes."""
    if is_plain_adamw(config):
        return sum(map(math.prod, shapes)) * ADAMW_BYTES
    return state_bytes(shapes, config)


@dataclass(frozen=True)
class _Work:
    """The tokens of a run."""

    batches: tuple[int, ...]
    """Tokens in each training batch, of very long runs in a part of them; a prefix that the rows
    share is counted once."""
    largest_rows: list[list[Example]]
    """The rows of the training batches that may need most."""
    evaluated_rows: list[Example]
    """The longest held-out or test rows, as many as are evaluated at once."""
    train_tokens: int
    """Tokens of the whole run without padding."""


def _count_work(config: RunConfig, resources: SharedResources) -> _Work:
    rows = resources.rows(config.dataset)
    train = resources.tokens("train", rows.train, config)
    held_out = resources.tokens("eval", rows.evaluation, config)
    test = resources.tokens("test", rows.test, config)
    lengths = train.lengths
    batches: list[list[int]] = []
    for step in step_batches(lengths, config, total_steps(config, lengths)):
        batches += step.batches
    sizes = [sum(lengths[index] for index in batch) for batch in batches]
    # The order of batches is random, so that the first of them stand for all; the largest of all
    # say whether the run fits.
    counted = batches[:MOST_COUNTED]
    if len(batches) > MOST_COUNTED:
        numbers = range(MOST_COUNTED, len(batches))
        largest = heapq.nlargest(LARGEST_COUNTED, numbers, key=sizes.__getitem__)
        counted += [batches[number] for number in largest]
    batch_lengths = [packed_length([train[index] for index in b]) for b in counted]
    # Evaluation batches have rows of similar length, so the longest rows come together.
    evaluated = itertools.chain(held_out, test)
    eval_batch_rows = config.trainer.per_device_eval_batch_size
    largest_evaluation = heapq.nlargest(eval_batch_rows, evaluated, key=computed_length)
    # Engines that pad rows need most for the batch with the longest row times its rows.
    widest = heapq.nlargest(
        MOST_SHAPED,
        counted,
        key=lambda batch: len(batch) * max(lengths[index] for index in batch),
    )
    fullest = heapq.nlargest(
        MOST_SHAPED, counted, key=lambda batch: sum(lengths[index] for index in batch)
    )
    return _Work(
        batches=tuple(batch_lengths),
        largest_rows=[[train[index] for index in batch] for batch in widest + fullest],
        evaluated_rows=largest_evaluation,
        train_tokens=sum(sizes),
    )


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
