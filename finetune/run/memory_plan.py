"""Memory, tokens and slots that a run will need, computed before any weights load."""

import dataclasses
import functools
import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.config.schema import RunConfig
from finetune.engine.schedule import total_steps
from finetune.errors import ConfigError, refusal
from finetune.run.resources import SharedResources, base_key

if TYPE_CHECKING:
    from transformers import PreTrainedModel


log = logging.getLogger(__name__)


USABLE = 0.9
"""The share of a machine's memory that is planned with."""


BUSY_TOKENS = 10_000
"""Tokens in one pass that keep a GPU busy: more slots than these need bring next to nothing (docs/benchmarks.md)."""


MOST_SLOTS = 16


CPU_SLACK = 1.7
"""Measured on a CPU: attention's padded copies, and freed memory that the C library holds back."""


LIBRARIES = 300 * 2**20
"""What a run on a CPU pages in of its libraries once it computes."""


GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """Memory in bytes by what it is for, and work in tokens."""

    process: int
    """Python and its libraries, where memory is the host's."""
    base: int
    adapter: int
    """One slot's weights, gradient, rounded copy, and the sum of several batches' gradients."""
    optimizer: int
    """One slot's."""
    activations: int
    """Of one slot's largest batch, kept for its backward pass."""
    activations_beside: int
    """The same beside other slots."""
    held: int
    """Dequantised weights, of a block at a time, where several slots train."""
    logits: int
    """Some at a time, and in float32 their softmax beside them."""
    evaluation: int
    """Of one slot's largest batch of held-out rows; no gradients are kept."""
    available: int
    """The machine's memory for this: the GPU's, else the host's."""
    batches: tuple[int, ...]
    """Tokens of each of one slot's batches, what its rows share counted once."""
    train_tokens: int
    """Of the whole run, padding not counted."""
    weights: int
    """That a token is multiplied by."""

    def tokens(self, slots: int) -> float:
        """In the largest of so many slots' batches that come together.

        They are drawn independently, so the largest hardly ever meet: by extreme value theory the maximum of n sums
        is about their mean and √(2 ln n) standard deviations.
        """
        mean, largest = statistics.fmean(self.batches), max(self.batches)
        spread = statistics.pstdev(self.batches) * math.sqrt(2 * math.log(len(self.batches)) * slots)
        return max(largest, min(slots * largest, slots * mean + spread))

    def peak(self, slots: int = 1) -> int:
        """The most that so many slots need at once."""
        kept, held = (self.activations, 0) if slots == 1 else (self.activations_beside, self.held)
        rows = max(kept * self.tokens(slots) / max(self.batches) + held, slots * self.evaluation)
        return int(self.process + self.base + self.logits + slots * (self.adapter + self.optimizer) + rows)

    @property
    def largest(self) -> int:
        """How many slots there is room for, 64 at most; 0: not even one."""
        return sum(self.peak(slots) <= USABLE * self.available for slots in range(1, 65))

    @property
    def slots(self) -> int:
        """How many slots are worth having: as many as keep a GPU busy; one on a CPU, which one keeps busy."""
        from finetune.model.device import on_gpu

        wanted = math.ceil(BUSY_TOKENS / statistics.fmean(self.batches)) if on_gpu() else 1
        return max(1, min(wanted, self.largest, MOST_SLOTS))

    def require_room(self, config: RunConfig) -> None:
        """Raise ConfigError, with the keys to change, where not one slot has room."""
        if self.largest:
            return
        parts = {"the base": self.base, "activations": self.activations, "evaluation": self.evaluation}
        most = max(parts, key=lambda name: parts[name])
        trainer = config.trainer
        if most == "the base":
            key, value = "quantization", "nf4" if not config.quantization.load_in_4bit else "a smaller model"
            advice = f"take {value}" if value != "nf4" else "quantization=nf4 needs less"
        elif most == "evaluation":
            key, advice = f"trainer.per_device_eval_batch_size={trainer.per_device_eval_batch_size}", "lower it"
        else:
            key = f"trainer.per_device_train_batch_size={trainer.per_device_train_batch_size}"
            advice = "lower it (and raise trainer.gradient_accumulation_steps)"
            if trainer.gradient_checkpointing is not True:
                advice += ", or trainer.gradient_checkpointing=true"
        raise ConfigError(
            f"{key}: the run needs {self.peak() / GIB:.1f} GiB, most of it for {most} "
            f"({parts[most] / GIB:.1f}), of {self.available * USABLE / GIB:.1f} GiB; {advice}"
        )


def resolve_checkpointing(
    config: RunConfig, engine: str, resources: SharedResources, saving: Sequence[object] = ()
) -> RunConfig:
    """The run with `trainer.gradient_checkpointing=auto` decided.

    Activations are computed twice where they would not fit otherwise, and on bases that are `saving` (by their
    `base_key`); of `trl`, whose memory is not planned, never.
    """
    if config.trainer.gradient_checkpointing != "auto":
        return config
    kept, saved = (
        dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, gradient_checkpointing=saves))
        for saves in (False, True)
    )
    if engine != "packed":
        return kept
    if base_key(saved) in saving:
        reason = "as for all jobs on this base"
    elif plan_memory(kept, resources).largest or not plan_memory(saved, resources).largest:
        return kept
    else:
        reason = "the activations would not fit otherwise"
    log.info("trainer.gradient_checkpointing=true: %s", reason)
    return saved


def plan_memory(config: RunConfig, resources: SharedResources) -> Plan:
    """Plan a run from its config, its rows and its base's shapes alone."""
    import torch

    from finetune.engine.packed.autograd_backend import AutogradBackend
    from finetune.engine.packed.backend import supports_gpu_decoder
    from finetune.model.adapter import add_adapter, modules_beside_language_model
    from finetune.model.architectures import text_config_of
    from finetune.model.device import on_gpu
    from finetune.model.loading import read_base_config, skeleton_of
    from finetune.model.memory import available_memory
    from finetune.model.quantization import compute_dtype, require_bitsandbytes

    require_bitsandbytes(config.quantization)
    work = _work(config, resources)
    base_config = read_base_config(resources.source(config.model), config.model)
    base = text_config_of(base_config)
    if getattr(base, "num_attention_heads", None) is None:
        raise refusal("model.name_or_path", config.model.name_or_path, "no plan for a model without attention heads")
    skeleton = skeleton_of(base_config, config.model)
    cost = _base_bytes(skeleton, config)
    beside = tuple(f"{name}." for name in modules_beside_language_model(skeleton))
    weights = sum(
        parameter.numel()
        for name, parameter in skeleton.named_parameters()
        if "embed" not in name and not name.startswith(beside)
    )
    with torch.device("meta"):  # nobody reads what is drawn
        adapted = add_adapter(skeleton, config.lora, config.seed)
    trained = [parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad]
    rounded = 2 if on_gpu() and compute_dtype(config.quantization).itemsize == 2 else 0
    size = rounded or 4
    hand = supports_gpu_decoder(base_config, config.quantization)
    if hand:
        from finetune.engine.packed.gpu.decoder import Decoder

        logits = Decoder.logits_chunk * base.vocab_size * size
    else:
        logits = AutogradBackend.logits_chunk * base.vocab_size * (8 + rounded)
    ends = _ends(adapted) if hand else None
    alone, several = (_activation_elements(base, config, ends, slots) for slots in (1, 2))
    kept, kept_beside = (
        int(max(work.batches) * own.training * size * (1 if on_gpu() else CPU_SLACK)) for own in (alone, several)
    )
    return Plan(
        process=0 if on_gpu() else _resident() + LIBRARIES,
        base=cost,
        adapter=sum(trained) * (8 + rounded + (4 if config.trainer.gradient_accumulation_steps > 1 else 0)),
        optimizer=sum(trained) * 8,
        activations=kept,
        activations_beside=kept_beside,
        held=_held(base, config) * size if hand else 0,
        logits=logits,
        evaluation=work.measured * alone.measuring * size,
        available=available_memory(),
        batches=work.batches,
        train_tokens=work.train_tokens,
        weights=weights,
    )


@dataclass(frozen=True)
class _Work:
    """A run's tokens."""

    batches: tuple[int, ...]
    """Of each batch that is trained, what its rows share counted once."""
    measured: int
    """Of the largest batch of held-out rows."""
    train_tokens: int
    """Of the whole run, padding not counted."""


def _work(config: RunConfig, resources: SharedResources) -> _Work:
    """Count what a run trains and measures."""
    from finetune.data.lengths import computed_length
    from finetune.data.tokens import as_list
    from finetune.engine.packed.batch import packed_length
    from finetune.engine.schedule import step_batches

    rows = resources.rows(config.dataset)
    train, held_out, test = (
        as_list(resources.tokens(part, own, config))
        for part, own in (("train", rows.train), ("eval", rows.evaluation), ("test", rows.test))
    )
    lengths = [len(row["input_ids"]) for row in train]
    batches = [
        batch for step in step_batches(lengths, config, total_steps(config, len(train))) for batch in step.batches
    ]
    shown = sorted(held_out + test, key=lambda row: -computed_length(row))
    return _Work(
        batches=tuple(packed_length([train[index] for index in batch]) for batch in batches),
        measured=packed_length(shown[: config.trainer.per_device_eval_batch_size]),
        train_tokens=sum(lengths[index] for batch in batches for index in batch),
    )


def _base_bytes(skeleton: "PreTrainedModel", config: RunConfig) -> int:
    """The base in memory: quantised layers with their scales, or on a CPU dequantised; the rest in its dtype."""
    import torch

    from finetune.model.quantization import compute_dtype, keeps_dequantized

    quantization, head = config.quantization, skeleton.get_output_embeddings()
    size = compute_dtype(quantization).itemsize
    linear = sum(
        module.weight.numel()
        for module in skeleton.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )
    others = sum(parameter.numel() for parameter in skeleton.parameters()) - linear
    if quantization.load_in_4bit and not keeps_dequantized(linear, config):
        scales = 1 / 64 + 4 / (64 * 256) if quantization.bnb_4bit_use_double_quant else 4 / 64
        each = 0.5 + scales
    elif quantization.load_in_8bit:
        each = 1.0
    else:
        each = float(size)
    return int(linear * each + others * size)


def _ends(model: Any) -> set[str]:
    """How the names of the layers end that have an adapter."""
    return {name.rsplit(".", 1)[-1] for name, part in model.named_modules() if hasattr(part, "lora_A")}


@dataclass(frozen=True)
class _Elements:
    """Numbers in memory for each token."""

    training: int
    measuring: int


def _activation_elements(base: Any, config: RunConfig, adapts: set[str] | None, slots: int) -> _Elements:
    """Of a token in a batch, and in held-out rows, where so many slots train.

    `adapts`: the ends of the adapted layers' names, where the GPU's own decoder computes; else None. A layer keeps the
    inputs of its norms, its queries, keys, values and what they give, what the gate takes, and the inputs of linear
    layers: on a GPU only of those that are adapted, and not the gate's product. With checkpointing it keeps its
    input alone, but for what `stored_blocks` says. Within a layer, the forward and backward of the gate are the widest.
    """
    hidden, inner, layers = base.hidden_size, _inner_width(base), base.num_hidden_layers
    queries, keys = _widths(base)
    saves = config.trainer.gradient_checkpointing is True
    if adapts is None:
        layer = 4 * hidden + 2 * queries + 2 * keys + 3 * inner
        passing = 4 * hidden + 2 * queries + 4 * inner + (layer if saves else 0)
        return _Elements(layers * (hidden if saves else layer) + passing, passing)
    from finetune.engine.packed.gpu.decoder import stored_blocks

    attention, gate = adapts & {"q_proj", "k_proj", "v_proj"}, adapts & {"gate_proj", "up_proj"}
    layer = (2 + bool(attention) + bool(gate)) * hidden + 2 * queries + 2 * keys + 2 * inner
    layer += queries + keys if base.model_type == "qwen3" else 0  # what the heads' own norms take
    through = 3 * bool(attention) + 2 * bool(gate) + len(adapts & {"o_proj", "down_proj"})  # of a group all or none
    layer += through * max(16, 1 << (config.lora.r - 1).bit_length())
    whole = stored_blocks(layers, slots) if saves else layers
    return _Elements(whole * layer + (layers - whole) * hidden + 3 * hidden + 2 * inner, layer + hidden + inner)


def _held(base: Any, config: RunConfig) -> int:
    """Numbers of a block's dequantised weights, from when it is computed again to its backward pass."""
    if not (config.trainer.gradient_checkpointing is True and config.quantization.load_in_4bit):
        return 0
    return int(base.hidden_size * 2 * (sum(_widths(base)) + _inner_width(base)))


def _inner_width(base: Any) -> int:
    """A token's numbers inside a feed-forward layer: four times the width where the config does not say."""
    return int(getattr(base, "intermediate_size", None) or 4 * base.hidden_size)


def _widths(base: Any) -> tuple[int, int]:
    """A token's numbers in a layer's queries, and in its keys."""
    heads = base.num_attention_heads
    width = getattr(base, "head_dim", None) or base.hidden_size // heads
    return heads * width, getattr(base, "num_key_value_heads", heads) * width


@functools.cache
def _resident() -> int:
    """This process's memory when it plans first: it has imported what a run imports, and a command no base yet."""
    from finetune.model.memory import resident_memory_bytes

    return resident_memory_bytes()
