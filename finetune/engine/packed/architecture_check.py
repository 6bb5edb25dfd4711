"""Whether the packed engine computes what a base's own code computes, checked before it is loaded.

There is no list of architectures: a small base of the same config is trained for one batch, packed
and row by row. `finetune.engine.packed_support` records the result.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from finetune.config.sections.lora import LoraSettings
from finetune.console import summary_line
from finetune.data.encoding import IGNORED
from finetune.data.lengths import MIN_SHARED_TOKENS
from finetune.engine.batch_decoding import compare_steps
from finetune.engine.evaluation import evaluation_mode
from finetune.engine.packed.autograd_backend import AutogradBackend
from finetune.engine.packed.batch import Row, pack_rows
from finetune.engine.packed.losses import token_losses
from finetune.engine.packed.pipeline import complete_pass
from finetune.engine.packed.row_by_row import recurrent_layers
from finetune.engine.packed.slot import Slot
from finetune.engine.probes import EXACT_TOLERANCE
from finetune.errors import Interrupted, is_out_of_memory_error
from finetune.model.adapter import add_adapter, keep_random_state
from finetune.model.architectures import logit_transform_of
from finetune.model.experts import expert_modules
from finetune.model.layer_kinds import config_with_few_layers
from finetune.model.quantized_layers import expert_weights
from finetune.model.small_config import VOCABULARY
from finetune.model.target_modules import names_of_linear_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

TOLERANCE = 1e-4
"""Largest difference of losses and gradients, as a share of their size. Those of correct
architectures differ by about 1e-6."""

MOST_WEIGHTS = 200_000_000
"""Weights of the largest small base that is built."""

ADAPTER = LoraSettings(
    r=2,
    alpha=4.0,
    dropout=0.0,
    target_modules="all-linear",
    bias="none",
    use_rslora=False,
    use_dora=False,
    init_lora_weights=True,
    extra={},
)
"""The adapters of the check, on every linear layer that a run may adapt."""


class _Refused(Exception):
    """The base can't be trained; the message says why."""


def check_architecture(narrow: "PreTrainedConfig") -> tuple[str | None, bool]:
    """Compare the packed engine with a small base's own code.

    Args:
        narrow: A base's config with small sizes, and with all layers.

    Returns:
        Why the engine can't train such bases, None if it can; and whether prompts of different
        lengths are answered together as each alone.

    Raises:
        Exception: Whatever the base's code raises.
    """
    with _on_cpu_in_float32():
        try:
            base = _random_base(config_with_few_layers(narrow))
            _compare_training(copy.deepcopy(base))
        # The latter of a feature that the engine has not.
        except (_Refused, NotImplementedError) as error:
            return summary_line(error), True
        return None, _answers_together(base)


@contextmanager
def _on_cpu_in_float32() -> Iterator[None]:
    """Compute on the CPU in float32, and leave PyTorch's random state as it was."""
    with (
        keep_random_state(),
        torch.device("cpu"),
        torch.autocast("cuda", enabled=False),
        warnings.catch_warnings(),
    ):
        # They would be about a base that nobody has asked for.
        warnings.simplefilter("ignore")
        yield


def _random_base(config: "PreTrainedConfig") -> "PreTrainedModel":
    """Create a base with weights so large that all it computes shows."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    routed = {id(experts) for experts in expert_modules(skeleton).values()}
    for name in expert_weights(skeleton):
        owner = skeleton.get_submodule(name.rpartition(".")[0])
        kind = type(owner).__name__.lower()
        if id(owner) not in routed and ("expert" in kind or "moe" in kind):
            raise _Refused("experts that its own code alone computes")
    weights = sum(weight.numel() for weight in skeleton.parameters())
    if weights > MOST_WEIGHTS:
        raise _Refused(f"no small base to try it on ({weights:,} weights)")
    base: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in base.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() > 1:
                # Keeps the size of what it multiplies.
                weight.copy_(noise / weight.shape[-1] ** 0.5)
            else:
                weight.add_(0.2 * noise)
    if routed:
        # The packed engine computes experts by another function, which is compared too.
        base.set_experts_implementation("eager")
    return base.requires_grad_(False).eval()


class _CheckBank:
    """What slots need of a bank."""

    capacity: int | None = None
    answer_tokens = 0
    device = torch.device("cpu")
    dtype = torch.float32
    shares_prefixes = False
    is_asynchronous = False

    def __init__(self, base: "PreTrainedModel") -> None:
        self.base = base

    def execute(self, *_: Any) -> list[Any]:
        """No run asks for anything."""
        raise NotImplementedError


def _compare_training(base: "PreTrainedModel") -> None:
    """Compare losses and gradients of a packed batch of two slots with those of each row alone.

    Raises:
        _Refused: They differ.
    """
    # By name, so that no line says what a run leaves out.
    lora = replace(ADAPTER, target_modules=names_of_linear_layers(base, ADAPTER))
    slots = []
    for seed in (0, 1):
        model = add_adapter(copy.deepcopy(base), lora, seed)
        slot = Slot(_CheckBank(base), lora, seed, model)
        # B begins at zero, and A would have no gradient.
        generator = torch.Generator().manual_seed(seed)
        slot.vector.add_(0.2 * torch.randn(slot.vector.shape, generator=generator))
        slots.append(slot)
    batches = [_rows(3, MIN_SHARED_TOKENS + 2), _rows(1, 5)]
    losses, gradients = _packed_results(base, slots, batches)
    expected = [
        _results_alone(slot, rows) for slot, rows in zip(slots, batches, strict=True)
    ]
    _require_equal(
        losses, torch.cat([row_losses for row_losses, _ in expected]), "losses"
    )
    for gradient, (_, gradient_alone) in zip(gradients, expected, strict=True):
        _require_equal(gradient, gradient_alone, "gradients")


def _rows(count: int, prefix_length: int) -> list[Row]:
    """Rows of different lengths, longer than the window, that begin alike."""
    generator = torch.Generator().manual_seed(count)

    def draw(length: int) -> list[int]:
        # The first ids are those of special tokens, whose embedding may be zero.
        ids: list[int] = torch.randint(
            8, VOCABULARY, (length,), generator=generator
        ).tolist()
        return ids

    prefix = draw(prefix_length)
    rows = []
    for number in range(count):
        ids = prefix + draw(12 + 3 * number)
        ignored = prefix_length + 1
        rows.append({"input_ids": ids, "labels": [IGNORED] * ignored + ids[ignored:]})
    return rows


def _packed_results(
    base: "PreTrainedModel", slots: list[Slot], batches: list[list[Row]]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the loss of each answer token, and each slot's gradient of their sum."""
    backend = AutogradBackend(base, gradient_checkpointing=False)
    for slot in slots:
        backend.attach(slot)
    group_size = 1 if recurrent_layers(base) else None
    batch = pack_rows(batches, torch.device("cpu"), [group_size] * len(batches))
    hidden, trace = complete_pass(backend.forward(batch, slots, [0] * len(slots)))
    result = token_losses(
        backend,
        base.get_output_embeddings(),
        logit_transform_of(base.config),
        hidden,
        batch.targets,
        torch.ones(len(batch.targets)),
    )
    assert result.gradient is not None
    complete_pass(backend.backward(trace, result.gradient))
    return result.losses, [slot.gradient for slot in slots]


def _results_alone(slot: Slot, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same of a slot's rows, one after another, by the base's own code and PEFT."""
    model = slot.model.eval()
    all_losses = []
    for row in rows:
        logits = model(
            input_ids=torch.tensor([row["input_ids"]]), use_cache=False
        ).logits
        targets = torch.tensor(row["labels"][1:])
        losses = torch.nn.functional.cross_entropy(
            logits[0, :-1].float(), targets, ignore_index=IGNORED, reduction="none"
        )
        answers = losses[targets != IGNORED]
        torch.autograd.backward(answers.sum())
        all_losses.append(answers.detach())
    gradients = [
        torch.zeros_like(weight) if weight.grad is None else weight.grad
        for weight in slot.parameters
    ]
    return torch.cat(all_losses), torch.cat([each.flatten() for each in gradients])


def _require_equal(computed: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    size = expected.norm()
    share = float((computed - expected).norm() / size)
    # Also where it is NaN.
    if not share <= TOLERANCE:
        raise _Refused(f"its {name} differ by {share:.2%} from those of its own code")


def _answers_together(base: "PreTrainedModel") -> bool:
    """Whether prompts of different lengths are answered together as each alone."""
    try:
        with evaluation_mode(base):
            computed, plain = compare_steps(base, 2, False, 12)
    except Exception as error:
        if isinstance(error, Interrupted) or is_out_of_memory_error(error):
            raise
        return False
    share = (computed - plain).norm(dim=-1) / plain.norm(dim=-1)
    return bool((share <= EXACT_TOLERANCE).all())
