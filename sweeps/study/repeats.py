"""Train trials again with other seeds, as runs that are no trials."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.config.schema import RunConfig
from finetune.console import error_line
from finetune.engine.interrupt import Interrupt
from finetune.engine.observer import Observer
from finetune.engine.steps import RunSteps
from finetune.errors import Interrupted
from finetune.files.atomic import read_json
from finetune.files.run_folder import RunFolder
from finetune.metrics.names import describe_metric
from finetune.run.context import RunContext
from finetune.run.resources import shared_resources
from finetune.run.run import run_steps
from finetune.tracking.tracker import Label
from sweeps.study.formatting import trial_name
from sweeps.study.logs import run_lines_to_files
from sweeps.study.pack import PackedRun, train_together
from sweeps.study.study import Study

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Repeat:
    """A trial to train again with another seed."""

    trial: int
    seed: int
    folder: RunFolder
    config: RunConfig
    purpose: str
    """Why, as trackers show it (`job_type`): `confirm` or `baseline`."""

    @property
    def name(self) -> str:
        """The name in logs and trackers, and beside whom other runs have trained."""
        prefix = "baseline" if self.purpose == "baseline" else self.trial
        return f"{prefix}-seed{self.seed}"


def repeat_run(
    study: Study,
    repeat: Repeat,
    interrupt: Interrupt,
    slots: int,
    errors: dict[Path, str],
    observer: Observer | None = None,
) -> PackedRun:
    """Make a repeat a run in a slot.

    Args:
        study: the study.
        repeat: the repeat; a folder that holds it completed is not trained again.
        interrupt: the interrupt that the runs of this process share.
        slots: number of runs that train at once.
        errors: receives the repeat's error by its folder, where it fails.
        observer: may stop the run.
    """
    folder = repeat.folder.path
    folder.mkdir(parents=True, exist_ok=True)
    packed_with: set[str] = set()
    # With its test rows, unlike a trial: they decide nothing, and show how much is gained.
    context = RunContext(
        observer=observer or Observer(),
        resources=shared_resources,
        label=_label(study, repeat),
        interactive=False,
        interrupt=interrupt,
        slots=slots,
        packed_with=packed_with,
    )
    steps = _train(study, repeat, context, errors)
    return PackedRun(repeat.name, steps, folder / "train.log", packed_with)


def retrain(study: Study, repeats: Sequence[Repeat]) -> dict[Path, str]:
    """Train the repeats that are not trained yet, in the study's slots.

    Args:
        study: the study.
        repeats: the runs to train, in this order.

    Returns:
        The error of each repeat that failed, by its folder.

    Raises:
        Interrupted: on SIGINT or SIGTERM, after each run has written a checkpoint.
    """
    # As many as fitted into memory when the study began.
    slots = int(study.optuna.user_attrs.get("slots", 1))
    waiting: Iterator[Repeat] = iter(repeats)
    interrupt = Interrupt()
    errors: dict[Path, str] = {}

    def next_run() -> PackedRun | None:
        repeat = next(waiting, None)
        if repeat is None:
            return None
        return repeat_run(study, repeat, interrupt, slots, errors)

    borrows = bool(study.optuna.user_attrs.get("borrows_blocks", False))
    with run_lines_to_files(), shared_resources.borrowed_blocks(borrows):
        train_together(next_run, slots)
    return errors


def _train(
    study: Study, repeat: Repeat, context: RunContext, errors: dict[Path, str]
) -> RunSteps[None]:
    """Train one repeat; record its error instead of raising it, unless it is interrupted."""
    try:
        yield from run_steps(repeat.config, repeat.folder, context)
    # An exception like others to Python, but no failure: it ends all runs.
    except Interrupted:
        raise
    except Exception as error:
        outcome = error_line(error)
        errors[repeat.folder.path] = outcome
    else:
        outcome = _outcome(study, repeat)
    log.info("trial %d with seed %d: %s", repeat.trial, repeat.seed, outcome)


def _outcome(study: Study, repeat: Repeat) -> str:
    """Describe how a repeat ended."""
    result = read_json(repeat.folder.result)
    if result["status"] != "completed":
        return str(result["status"])
    objective = study.objectives[0]
    return f"{describe_metric(objective)} {result['metrics'][objective]:.4f}"


def _label(study: Study, repeat: Repeat) -> Label:
    """Return how trackers name the repeat."""
    return Label(
        id=f"{study.uid}-{repeat.name}",
        name=trial_name(repeat.trial, {"seed": repeat.seed}),
        group=study.name,
        job_type=repeat.purpose,
        folder=study.folder,
    )
