"""How many runs train together on one worker. How they take turns is in `pack`."""

import logging
from collections.abc import Sequence

from finetune.config.schema import RunConfig
from finetune.console import summary_line
from finetune.engine.selection import reason_unsupported
from finetune.model.base_config import read_base_config
from finetune.model.device import on_gpu, select_gpus
from finetune.run.memory_plan import plan_memory, resolve_checkpointing
from finetune.run.resources import base_key, shared_resources

log = logging.getLogger(__name__)


def choose_slots(slots: int | str, neediest: RunConfig) -> tuple[int, RunConfig]:
    """Choose the number of slots of a worker.

    Args:
        slots: the number, or `auto`: as many as fit into GPU memory, or one on a CPU.
        neediest: the config that needs the most memory of all that will train.

    Returns:
        The number of slots, and the config with `gradient_checkpointing` decided.
    """
    resolved = resolve_checkpointing(neediest, "packed", shared_resources)
    if slots != "auto":
        return int(slots), resolved
    if not on_gpu():
        # One run keeps a CPU busy.
        return 1, resolved
    plan = plan_memory(resolved, shared_resources)
    return plan.slots, resolved


def memory_rank(config: RunConfig) -> tuple[int, int]:
    """Return a sort key that grows with a run's memory: batch size, then LoRA rank.

    Activations, which grow with the batch, take far more memory than an adapter.
    """
    return config.trainer.per_device_train_batch_size, config.lora.r


def choose_job_slots(
    slots: int | str, configs: Sequence[RunConfig]
) -> tuple[int, list[object]]:
    """Choose how many jobs train at once, from the neediest job of each base and data set.

    Args:
        slots: the number; `auto`: as many as fit into memory.
        configs: the jobs' configs.

    Returns:
        The number of slots, and the bases, by their `base_key`, on which
        `trainer.gradient_checkpointing=auto` is partial.
    """
    packed = [config for config in configs if config.trainer.engine != "trl"]
    fixed_count = slots if isinstance(slots, int) else 1
    if not packed:
        return fixed_count, []
    gpus = [config.trainer.gpus for config in packed]
    # Before a plan asks for the GPU's memory.
    select_gpus(0, max((size for size in gpus if isinstance(size, int)), default=1))
    # Kinds of jobs whose neediest one has been planned.
    planned: set[str] = set()
    counts = []
    checkpointed_bases: list[object] = []
    for config in sorted(packed, key=memory_rank, reverse=True):
        checkpointing = config.trainer.gradient_checkpointing
        kind = repr((base_key(config), checkpointing, config.dataset))
        if kind in planned:
            continue
        plan = _plan(slots, config)
        # Its kind stays unplanned: the next neediest job of it is tried.
        if plan is None:
            continue
        planned.add(kind)
        count, resolved = plan
        counts.append(count)
        if checkpointing == "auto" and resolved.trainer.checkpointing:
            checkpointed_bases.append(base_key(resolved))
    return min(counts, default=fixed_count), checkpointed_bases


def _plan(slots: int | str, config: RunConfig) -> tuple[int, RunConfig] | None:
    """Plan slots for one job; None if TRL trains it, or if it can't be planned.

    A job that can't be planned reports by itself what is wrong.
    """
    try:
        base = shared_resources.source(config.model)
        base_config = read_base_config(base, config.model)
        if reason_unsupported(config, base_config):
            return None
        return choose_slots(slots, config)
    except Exception as error:
        log.debug("not planned: %s", summary_line(error))
        return None
