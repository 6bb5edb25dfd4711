"""The memory that a run will need, computed before any weights load.

`python -m finetune.plan` prints it; runs use it to decide `trainer.gradient_checkpointing=auto`,
studies to decide the number of slots.
"""

import dataclasses
import logging
from collections.abc import Sequence

from finetune.config.schema import RunConfig
from finetune.config.sections.trainer import Checkpointing
from finetune.engine.selection import answers_together
from finetune.model.memory import available_memory
from finetune.model.quantization import require_bitsandbytes
from finetune.run.plan import Plan
from finetune.run.planned_base import PlannedBase
from finetune.run.planned_work import count_work
from finetune.run.quantization import resolve_quantization
from finetune.run.resources import SharedResources, base_key

log = logging.getLogger(__name__)


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
    work = count_work(config, resources)
    base = PlannedBase.read(source, config)
    return Plan(
        devices=base.devices(work),
        borrowing=base.borrowing_devices(work),
        available=available_memory(len(base.stages)),
        batches=work.batches,
        train_tokens=work.train_tokens,
        weights=base.weights,
        answers_together=answers_together(config, base.base_config),
    )
