"""How many runs train together on one worker."""

from finetune.config.schema import RunConfig
from finetune.run.memory_plan import plan_memory, resolve_checkpointing
from finetune.run.resources import shared_resources


def choose_slots(slots: int | str, neediest: RunConfig) -> tuple[int, RunConfig]:
    """Choose the number of slots of a worker.

    Args:
        slots: the number, or `auto`: as many as fit into GPU memory, or one on a CPU.
        neediest: the config that needs the most memory of all that will train.

    Returns:
        The number of slots, and the config with `gradient_checkpointing` decided.
    """
    from finetune.model.device import on_gpu

    resolved = resolve_checkpointing(neediest, "packed", shared_resources)
    if slots != "auto":
        return int(slots), resolved
    if not on_gpu():
        return 1, resolved  # one run keeps a CPU busy
    return plan_memory(resolved, shared_resources).slots, resolved


def memory_rank(config: RunConfig) -> tuple[int, int]:
    """Return a sort key that grows with a run's memory: batch size, then LoRA rank."""
    return config.trainer.per_device_train_batch_size, config.lora.r
