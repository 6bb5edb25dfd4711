"""What a run tells the user who interrupts it: how far it is, and the command that continues it."""

import contextlib
import os
import shlex
from collections.abc import Iterator

from finetune.files.run_folder import RunFolder, checkpoint_step
from finetune.run.result import Result


def resume_command(folder: RunFolder) -> str:
    """Return the command that resumes the run in a folder, for the user's shell."""
    path = os.path.relpath(folder.path)
    argument = shlex.quote(f"resume={path}")
    return f"python -m finetune {argument}"


@contextlib.contextmanager
def explain_interruption(result: Result, folder: RunFolder) -> Iterator[None]:
    """Say how a run continues whose block is ended by Ctrl-C or SIGTERM at once.

    This happens before and after training, and at the second signal. The first signal during
    training is handled by `finetune.engine.interrupt`: the run ends after its current step.

    Args:
        result: The run's result so far. Only an interactive run explains itself: the other runs of
            a pack are interrupted together, and the pack says so.
        folder: The run folder.

    Raises:
        KeyboardInterrupt: The same, with a message for the user.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        if not result.context.interactive:
            raise
        raise KeyboardInterrupt(_how_to_continue(result, folder)) from error


def _how_to_continue(result: Result, folder: RunFolder) -> str:
    checkpoint = folder.last_checkpoint()
    if checkpoint is not None:
        step = checkpoint_step(checkpoint)
        return f"interrupted; {resume_command(folder)} continues after step {step}"
    step = result.progress.step if result.progress else 0
    if step == 0:
        progress = "interrupted before the first step: nothing is trained yet"
    else:
        progress = f"interrupted after step {step}, of which no checkpoint is saved"
    return f"{progress}; the same command starts it again"
