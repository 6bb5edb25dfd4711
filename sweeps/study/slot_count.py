"""How many runs train together on one worker. How they take turns is in `pack`."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from finetune.config.schema import RunConfig
from finetune.console import summary_line
from finetune.engine.selection import reason_unsupported
from finetune.model.base_config import read_base_config
from finetune.model.device import on_gpu, select_gpus, spread_gpus
from finetune.run.memory_plan import plan_memory, resolve_checkpointing
from finetune.run.resources import base_key, shared_resources

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlotChoice:
    """How many runs train together on one worker, and how."""

    count: int
    config: RunConfig
    """The neediest run's, with `gradient_checkpointing` decided."""
    borrows_blocks: bool = False
    """See `Plan.borrows_blocks`."""
    is_checkpointed: bool = False
    """Whether `auto` has decided for checkpointing."""


def choose_slots(
    slots: int | str, neediest: RunConfig, may_borrow: bool, runs: int | None = None
) -> SlotChoice:
    """Choose the number of slots of a worker.

    Args:
        slots: the number, or `auto`: as many as fit into GPU memory, or one on a CPU.
        neediest: the config that needs the most memory of all that will train.
        may_borrow: whether several GPUs may borrow blocks; else they take turns.
        runs: how many there are to train; None: not known.
    """
    resolved = resolve_checkpointing(neediest, "packed", shared_resources)
    is_spread = spread_gpus(resolved.trainer.gpus) > 1
    if slots != "auto" and not is_spread:
        return SlotChoice(int(slots), resolved)
    if not on_gpu():
        # One run keeps a CPU busy.
        return SlotChoice(1, resolved)
    plan = plan_memory(resolved, shared_resources)
    if not may_borrow:
        plan = replace(plan, borrowing=())
    count = plan.slots if slots == "auto" else int(slots)
    return SlotChoice(count, resolved, plan.borrows_blocks(min(count, runs or count)))


def choose_in_one_way(choose: Callable[[bool], list[SlotChoice]]) -> list[SlotChoice]:
    """Choose slots for several bases, whose blocks are borrowed for all or for none.

    Args:
        choose: returns each base's choice; its argument is `may_borrow`.
    """
    choices = choose(True)
    # More slots may fit where blocks are borrowed than where the GPUs take turns.
    if len({choice.borrows_blocks for choice in choices}) > 1:
        choices = choose(False)
    return choices


def memory_rank(config: RunConfig) -> tuple[int, int]:
    """Return a sort key that grows with a run's memory: batch size, then LoRA rank.

    Activations, which grow with the batch, take far more memory than an adapter.
    """
    return config.trainer.per_device_train_batch_size, config.lora.r


@dataclass(frozen=True)
class JobSlots:
    """How many jobs train at once, and how."""

    count: int
    checkpointed_bases: list[object] = field(default_factory=list)
    """By their `base_key`: where `trainer.gradient_checkpointing=auto` is partial."""
    borrows_blocks: bool = False
    """See `Plan.borrows_blocks`."""


def choose_job_slots(slots: int | str, configs: Sequence[RunConfig]) -> JobSlots:
    """Choose how many jobs train at once, from the neediest job of each base and data set.

    Args:
        slots: the number; `auto`: as many as fit into memory.
        configs: the jobs' configs.
    """
    packed = [config for config in configs if config.trainer.engine != "trl"]
    fixed_count = slots if isinstance(slots, int) else 1
    if not packed:
        return JobSlots(fixed_count)
    gpus = [config.trainer.gpus for config in packed]
    # Before a plan asks for the GPU's memory.
    select_gpus(0, max((size for size in gpus if isinstance(size, int)), default=1))

    def choose(may_borrow: bool) -> list[SlotChoice]:
        return _choose_for_kinds(slots, packed, may_borrow, len(configs))

    choices = choose_in_one_way(choose)
    return JobSlots(
        min((choice.count for choice in choices), default=fixed_count),
        [base_key(choice.config) for choice in choices if choice.is_checkpointed],
        bool(choices) and all(choice.borrows_blocks for choice in choices),
    )


def _choose_for_kinds(
    slots: int | str, configs: Sequence[RunConfig], may_borrow: bool, runs: int
) -> list[SlotChoice]:
    """Choose for the neediest job of each kind."""
    # Kinds of jobs whose neediest one has been planned.
    planned: set[str] = set()
    choices = []
    for config in sorted(configs, key=memory_rank, reverse=True):
        checkpointing = config.trainer.gradient_checkpointing
        kind = repr((base_key(config), checkpointing, config.dataset))
        if kind in planned:
            continue
        choice = _plan(slots, config, may_borrow, runs)
        # Its kind stays unplanned: the next neediest job of it is tried.
        if choice is None:
            continue
        planned.add(kind)
        is_checkpointed = checkpointing == "auto" and bool(
            choice.config.trainer.checkpointing
        )
        choices.append(replace(choice, is_checkpointed=is_checkpointed))
    return choices


def _plan(
    slots: int | str, config: RunConfig, may_borrow: bool, runs: int
) -> SlotChoice | None:
    """Plan slots for one job; None if TRL trains it, or if it can't be planned.

    A job that can't be planned reports by itself what is wrong.
    """
    try:
        base = shared_resources.source(config.model)
        base_config = read_base_config(base, config.model)
        if reason_unsupported(config, base_config):
            return None
        return choose_slots(slots, config, may_borrow, runs)
    except Exception as error:
        log.debug("not planned: %s", summary_line(error))
        return None
