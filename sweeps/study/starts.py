"""How often a trial has started at the same checkpoint, and what became of its workers.

A trial that kills its worker (out of the host's memory, a fault of a driver) must not do so again
and again; one whose worker was killed with its session (a preemption, a reboot) is innocent. So
after two lost workers without a new checkpoint a trial trains alone in a process of its own, see
`sweeps.study.isolation`, and fails only where the sweep command outlives that process.
"""

import optuna
from optuna.trial import FrozenTrial

from finetune.files.atomic import read_json
from finetune.files.run_folder import RunFolder, checkpoint_step

MAX_LOSSES = 3
"""How many workers a trial may lose without a new checkpoint; then it has failed."""

LOST_WORKERS = f"lost its worker {MAX_LOSSES} times without a new checkpoint"
"""The error of such a trial."""


def needs_isolation(trial: FrozenTrial) -> bool:
    """Whether a trial has lost so many workers that it may fail with the next one."""
    starts = trial.user_attrs.get("starts", [])
    last_starts = starts[1 - MAX_LOSSES :]
    # All at the same checkpoint, by its step.
    return len(last_starts) == MAX_LOSSES - 1 and len(set(last_starts)) == 1


def record_start(trial: optuna.Trial, folder: RunFolder) -> None:
    """Record a start of a trial, by its checkpoint's step.

    Args:
        trial: the trial.
        folder: its run folder.
    """
    starts = list(trial.user_attrs.get("starts", []))
    result = read_json(folder.result) or {}
    if result.get("status") == "interrupted":
        # The worker was not lost. The result is removed, or it would excuse later starts too.
        starts = []
        folder.result.unlink()
    trial.set_user_attr("starts", [*starts, start_step(folder)])


def start_step(folder: RunFolder) -> int:
    """Return the step at which a trial would start."""
    checkpoint = folder.last_checkpoint()
    return checkpoint_step(checkpoint) if checkpoint else 0
