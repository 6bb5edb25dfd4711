"""Train trials again with other seeds, for a confirmation."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.config.schema import RunConfig
from finetune.console import error_line
from finetune.engine.interrupt import Interrupt
from finetune.engine.steps import RunSteps
from finetune.errors import Interrupted
from finetune.files.atomic import read_json
from finetune.files.run_folder import RunFolder
from finetune.run.context import RunContext
from finetune.run.resources import shared_resources
from finetune.run.run import run_steps
from finetune.tracking.tracker import Label
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
    return _Retraining(study, repeats).run()


class _Retraining:
    """The repeats that are being trained."""

    def __init__(self, study: Study, repeats: Sequence[Repeat]) -> None:
        self._study = study
        # As many as fitted into memory when the study began.
        self._slots = int(study.optuna.user_attrs.get("slots", 1))
        self._waiting: Iterator[Repeat] = iter(repeats)
        self._interrupt = Interrupt()
        self._errors: dict[Path, str] = {}

    def run(self) -> dict[Path, str]:
        with run_lines_to_files():
            train_together(self._next_run, self._slots)
        return self._errors

    def _next_run(self) -> PackedRun | None:
        repeat = next(self._waiting, None)
        if repeat is None:
            return None
        folder = repeat.folder.path
        folder.mkdir(parents=True, exist_ok=True)
        packed_with: set[str] = set()
        steps = self._train(repeat, packed_with)
        return PackedRun(
            folder.name,
            steps,
            folder / "train.log",
            packed_with,
        )

    def _train(self, repeat: Repeat, packed_with: set[str]) -> RunSteps[None]:
        """Train one repeat; record its error instead of raising it, unless it is interrupted."""
        # With its test rows, unlike a trial: they decide nothing, and show how much is gained.
        context = RunContext(
            resources=shared_resources,
            label=self._label(repeat),
            interactive=False,
            interrupt=self._interrupt,
            slots=self._slots,
            packed_with=packed_with,
        )
        try:
            yield from run_steps(repeat.config, repeat.folder, context)
        # An exception like others to Python, but no failure: it ends all runs.
        except Interrupted:
            raise
        except Exception as error:
            self._errors[repeat.folder.path] = error_line(error)
        self._log_end(repeat)

    def _label(self, repeat: Repeat) -> Label:
        suffix = f"{repeat.trial}-seed{repeat.seed}"
        return Label(
            id=f"{self._study.uid}-{suffix}",
            name=f"{self._study.name}-{suffix}",
            group=self._study.name,
            job_type="confirm",
        )

    def _log_end(self, repeat: Repeat) -> None:
        outcome = self._errors.get(repeat.folder.path)
        if outcome is None:
            objective = self._study.objectives[0]
            metrics = read_json(repeat.folder.result)["metrics"]
            outcome = f"{objective} {metrics[objective]:.4f}"
        log.info("trial %d with seed %d: %s", repeat.trial, repeat.seed, outcome)
