"""The memory that a run will need, computed before any weights load, and how many slots fit.

`python -m finetune.plan` prints it; runs use it to decide `trainer.gradient_checkpointing=auto`,
studies to decide the number of slots.
"""

import dataclasses
import functools
import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from finetune.config.schema import RunConfig
from finetune.data.lengths import computed_length
from finetune.data.tokens import as_list
from finetune.engine.packed.backend import supports_gpu_decoder
from finetune.engine.packed.batch import packed_length
from finetune.engine.schedule import step_batches, total_steps
from finetune.errors import ConfigError, refusal
from finetune.model.adapter import add_adapter, modules_outside_language_model
from finetune.model.architectures import text_config_of
from finetune.model.device import on_gpu
from finetune.model.loading import read_base_config, skeleton_of
from finetune.model.memory import GIB, available_memory, resident_memory_bytes
from finetune.model.quantization import (
    compute_dtype,
    require_bitsandbytes,
)
from finetune.run.memory_costs import (
    activation_elements,
    adapted_layers,
    base_bytes,
    block_weights,
    logits_bytes,
)
from finetune.run.resources import SharedResources, base_key

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

USABLE = 0.9
"""Fraction of the memory that the plan may use."""

BUSY_TOKENS = 10_000
"""Tokens in one pass that keep a GPU busy: more slots bring next to nothing
(docs/benchmarks.md)."""

MOST_SLOTS = 16
"""Limit of `slots=auto`."""

CPU_SLACK = 1.7
"""Factor on a CPU's activations, measured: padded copies in attention, and freed memory that the C
library keeps."""

LIBRARIES = 300 * 2**20
"""Bytes of its libraries that a run on a CPU pages in once it computes."""


@dataclass(frozen=True)
class Plan:
    """Memory in bytes by what it is for, and work in tokens."""

    process: int
    """Python and its libraries, where memory is the host's."""
    base: int
    """The frozen base."""
    adapter: int
    """One slot's weights, gradient, rounded copy, and the sum of the gradients of several
    batches."""
    optimizer: int
    """One slot's optimizer state."""
    activations: int
    """Activations of one slot's largest batch that the backward pass needs, when it trains
    alone."""
    activations_beside: int
    """The same when other slots train with it."""
    held: int
    """Dequantised weights of one block, kept where several slots train with checkpointing."""
    logits: int
    """One chunk of logits, and in float32 its softmax."""
    evaluation: int
    """Activations of one slot's largest batch of held-out rows, without a backward pass."""
    available: int
    """The memory there is: the GPU's, else the host's."""
    batches: tuple[int, ...]
    """Tokens in each of one slot's batches; a prefix that the rows share is counted once."""
    train_tokens: int
    """Tokens of the whole run without padding."""
    weights: int
    """Weights that each token is multiplied by."""

    def tokens(self, slots: int) -> float:
        """Return the tokens in the largest pass of several slots.

        Batches are drawn independently, so the largest ones hardly ever meet: by extreme value
        theory the maximum of n sums is about their mean plus sqrt(2 ln n) standard deviations.
        """
        mean = statistics.fmean(self.batches)
        largest = max(self.batches)
        deviations = math.sqrt(2 * math.log(len(self.batches)) * slots)
        expected = slots * mean + statistics.pstdev(self.batches) * deviations
        return max(largest, min(slots * largest, expected))

    def peak(self, slots: int = 1) -> int:
        """Return the most bytes that so many slots need at once."""
        if slots == 1:
            activations = self.activations
            dequantized = 0
        else:
            activations = self.activations_beside
            dequantized = self.held
        training = activations * self.tokens(slots) / max(self.batches) + dequantized
        rows = max(training, slots * self.evaluation)
        adapters = slots * (self.adapter + self.optimizer)
        return int(self.process + self.base + self.logits + adapters + rows)

    @property
    def largest(self) -> int:
        """The number of slots that fit, at most 64; 0: not even one fits."""
        limit = USABLE * self.available
        return sum(self.peak(slots) <= limit for slots in range(1, 65))

    @property
    def slots(self) -> int:
        """The recommended number of slots: as many as keep a GPU busy; 1 on a CPU."""
        busy = math.ceil(BUSY_TOKENS / statistics.fmean(self.batches)) if on_gpu() else 1
        return max(1, min(busy, self.largest, MOST_SLOTS))

    def require_room(self, config: RunConfig) -> None:
        """Raise ConfigError, with the keys to change, where not one slot fits."""
        if self.largest:
            return
        purposes = {
            "the base": self.base,
            "activations": self.activations,
            "evaluation": self.evaluation,
        }
        purpose = max(purposes, key=lambda name: purposes[name])
        key, advice = _advice(purpose, config)
        need = f"the run needs {self.peak() / GIB:.1f} GiB"
        share = f"most of it for {purpose} ({purposes[purpose] / GIB:.1f})"
        limit = f"of {self.available * USABLE / GIB:.1f} GiB"
        raise ConfigError(f"{key}: {need}, {share}, {limit}; {advice}")


def _advice(purpose: str, config: RunConfig) -> tuple[str, str]:
    """The key that decides how much memory a purpose takes, and how to change it."""
    trainer = config.trainer
    if purpose == "the base":
        if config.quantization.load_in_4bit:
            return "quantization", "take a smaller model"
        return "quantization", "quantization=nf4 needs less"
    if purpose == "evaluation":
        return (
            f"trainer.per_device_eval_batch_size={trainer.per_device_eval_batch_size}",
            "lower it",
        )
    key = f"trainer.per_device_train_batch_size={trainer.per_device_train_batch_size}"
    advice = "lower it (and raise trainer.gradient_accumulation_steps)"
    if trainer.gradient_checkpointing is not True:
        advice += ", or trainer.gradient_checkpointing=true"
    return key, advice


def resolve_checkpointing(
    config: RunConfig,
    engine: str,
    resources: SharedResources,
    checkpointed_bases: Sequence[object] = (),
) -> RunConfig:
    """Decide `trainer.gradient_checkpointing=auto`.

    It becomes true where the activations would not fit otherwise. Of TRL's runs, whose memory is
    not planned, it becomes false.

    Args:
        config: The run's config.
        engine: packed or trl.
        resources: Share rows and tokens.
        checkpointed_bases: Keys (`base_key`) of bases on which it is true for all runs.

    Returns:
        The config with true or false.
    """
    if config.trainer.gradient_checkpointing != "auto":
        return config
    without = _with_checkpointing(config, False)
    checkpointed = _with_checkpointing(config, True)
    if engine != "packed":
        return without
    if base_key(checkpointed) in checkpointed_bases:
        reason = "as for all jobs on this base"
    elif (
        plan_memory(without, resources).largest or not plan_memory(checkpointed, resources).largest
    ):
        return without
    else:
        reason = "the activations would not fit otherwise"
    log.info("trainer.gradient_checkpointing=true: %s", reason)
    return checkpointed


def _with_checkpointing(config: RunConfig, value: bool) -> RunConfig:
    trainer = dataclasses.replace(config.trainer, gradient_checkpointing=value)
    return dataclasses.replace(config, trainer=trainer)


def plan_memory(config: RunConfig, resources: SharedResources) -> Plan:
    """Plan a run from its config, its rows and its base's shapes; no weights are loaded.

    Raises:
        ConfigError: The base or the rows can't be read, bitsandbytes is missing, or the base has no
            attention heads, so that its activations are not known.
    """
    require_bitsandbytes(config.quantization)
    work = _count_work(config, resources)
    base_config = read_base_config(resources.source(config.model), config.model)
    shapes = text_config_of(base_config)
    if getattr(shapes, "num_attention_heads", None) is None:
        name = config.model.name_or_path
        raise refusal("model.name_or_path", name, "no plan for a model without attention heads")
    skeleton = skeleton_of(base_config, config.model)
    weights = _multiplied_weights(skeleton)
    with torch.device("meta"):  # the drawn values are not read
        adapted = add_adapter(skeleton, config.lora, config.seed)
    trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    has_gpu = on_gpu()
    half_precision = has_gpu and compute_dtype(config.quantization).itemsize == 2
    element_bytes = 2 if half_precision else 4
    uses_decoder = supports_gpu_decoder(base_config, config.quantization)
    targets = adapted_layers(adapted) if uses_decoder else None
    alone = activation_elements(shapes, config, targets, 1)
    packed = activation_elements(shapes, config, targets, 2)
    largest_batch_bytes = max(work.batches) * element_bytes * (1 if has_gpu else CPU_SLACK)
    sums_gradients = config.trainer.gradient_accumulation_steps > 1
    bytes_per_weight = 8 + (2 if half_precision else 0) + (4 if sums_gradients else 0)
    return Plan(
        process=0 if has_gpu else _resident() + LIBRARIES,
        base=base_bytes(skeleton, config),
        adapter=trained * bytes_per_weight,
        optimizer=trained * 8,
        activations=int(largest_batch_bytes * alone.training),
        activations_beside=int(largest_batch_bytes * packed.training),
        held=block_weights(shapes, config) * element_bytes if uses_decoder else 0,
        logits=logits_bytes(shapes.vocab_size, uses_decoder, half_precision),
        evaluation=work.evaluated * alone.evaluating * element_bytes,
        available=available_memory(),
        batches=work.batches,
        train_tokens=work.train_tokens,
        weights=weights,
    )


@dataclass(frozen=True)
class _Work:
    """The tokens of a run."""

    batches: tuple[int, ...]
    """Tokens in each training batch; a prefix that the rows share is counted once."""
    evaluated: int
    """Tokens in the largest batch of held-out or test rows."""
    train_tokens: int
    """Tokens of the whole run without padding."""


def _count_work(config: RunConfig, resources: SharedResources) -> _Work:
    rows = resources.rows(config.dataset)
    train = as_list(resources.tokens("train", rows.train, config))
    held_out = as_list(resources.tokens("eval", rows.evaluation, config))
    test = as_list(resources.tokens("test", rows.test, config))
    lengths = [len(row["input_ids"]) for row in train]
    steps = step_batches(lengths, config, total_steps(config, len(train)))
    batches = [batch for step in steps for batch in step.batches]
    evaluated = sorted(held_out + test, key=computed_length, reverse=True)
    return _Work(
        batches=tuple(packed_length([train[index] for index in batch]) for batch in batches),
        evaluated=packed_length(evaluated[: config.trainer.per_device_eval_batch_size]),
        train_tokens=sum(lengths[index] for batch in batches for index in batch),
    )


def _multiplied_weights(skeleton: "PreTrainedModel") -> int:
    """Weights of the language model without its embedding, which is only looked up."""
    others = tuple(f"{name}." for name in modules_outside_language_model(skeleton))
    return sum(
        weight.numel()
        for name, weight in skeleton.named_parameters()
        if "embed" not in name and not name.startswith(others)
    )


@functools.cache
def _resident() -> int:
    """Memory of this process when it first plans: libraries imported, no base loaded."""
    return resident_memory_bytes()
