"""How the trials of a study are trained: the engine, and its slots."""

from dataclasses import dataclass

from finetune.config.sections.trainer import Checkpointing
from sweeps.study.study import Study


@dataclass(frozen=True)
class EngineChoice:
    """How all trials of a study are trained, decided once, when the study begins."""

    name: str
    """`packed` or `trl`."""
    slots: int
    """Number of trials that train together on one worker."""
    checkpointing: Checkpointing = False
    """The value of `trainer.gradient_checkpointing` where the config leaves it to `auto`."""
    borrows_blocks: bool = False
    """Whether each of a worker's GPUs computes all blocks for its own slots; see
    `Plan.borrows_blocks`."""


def decide_engine(study: Study, choice: EngineChoice) -> EngineChoice:
    """Store how trials are trained, unless an earlier session did.

    Args:
        study: the study.
        choice: this session's choice.

    Returns:
        The stored choice.
    """
    if "engine" not in study.optuna.user_attrs:
        study.optuna.set_user_attr("slots", choice.slots)
        study.optuna.set_user_attr("checkpointing", choice.checkpointing)
        study.optuna.set_user_attr("borrows_blocks", choice.borrows_blocks)
        # Last, because its presence says that all are stored.
        study.optuna.set_user_attr("engine", choice.name)
    stored = study.optuna.user_attrs
    return EngineChoice(
        name=str(stored["engine"]),
        slots=int(stored["slots"]),
        checkpointing=stored.get("checkpointing", False),
        borrows_blocks=stored.get("borrows_blocks", False),
    )
