"""How often a trial may start at the same checkpoint, and what became of its workers."""

import optuna
from optuna.trial import FrozenTrial

from finetune.files.atomic import read_json
from finetune.files.run_folder import RunFolder, checkpoint_step

MAX_STARTS = 3
"""How often a trial may start at the same checkpoint; after as many lost workers it has failed."""

LOST_WORKERS = f"lost its worker {MAX_STARTS} times without a new checkpoint"
"""The error of a trial that has used up its starts."""


def is_on_last_attempt(trial: FrozenTrial) -> bool:
    """Whether a trial fails if it loses its worker once more without a new checkpoint.

    Such a trial trains alone, so that no other trial on its worker can be the cause.
    """
    starts = trial.user_attrs.get("starts", [])
    last_starts = starts[1 - MAX_STARTS :]
    if len(last_starts) < MAX_STARTS - 1:
        return False
    # All at the same checkpoint, by its step.
    return len(set(last_starts)) == 1


def record_start(trial: optuna.Trial, folder: RunFolder) -> bool:
    """Record a start of a trial, by its checkpoint's step.

    Args:
        trial: the trial.
        folder: its run folder.

    Returns:
        Whether the trial may start: it has not used up its starts.
    """
    checkpoint = folder.last_checkpoint()
    step = checkpoint_step(checkpoint) if checkpoint else 0
    starts = list(trial.user_attrs.get("starts", []))
    result = read_json(folder.result) or {}
    if result.get("status") == "interrupted":
        # The worker was not lost. The result is removed, or it would excuse later starts too.
        starts = []
        folder.result.unlink()
    if starts[-MAX_STARTS:] == [step] * MAX_STARTS:
        return False
    trial.set_user_attr("starts", [*starts, step])
    return True
