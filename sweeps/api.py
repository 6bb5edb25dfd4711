"""Studies from Python: `sweeps.search` and `sweeps.load_study` return a `Study`.

Each call does what the command does, with the same checks, log lines and folders, and leaves the
process as it was: see `finetune.in_process`.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.api import Run
from finetune.app import run_overrides
from finetune.errors import NoAnswer, refusal
from finetune.files.atomic import read_json
from finetune.files.find_run import LATEST
from finetune.generation_arguments import require_positive
from finetune.in_process import in_process
from finetune.run.job import run_job
from sweeps.answer.report import write_report
from sweeps.answer.winner import find_winner, run_with_adapter
from sweeps.commands.act import SEEDS, TOP, confirm_study
from sweeps.space.feasibility import why_no_winner
from sweeps.study import study as stored
from sweeps.study.find_study import find_study
from sweeps.study.find_study import load_study as load_stored
from sweeps.study.formatting import format_counts
from sweeps.study.inside import point_of
from sweeps.study.trials_frame import trials_frame

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Study", "Winner", "load_study", "search"]


def search(*overrides: str) -> "Study":
    """Begin or resume a study, as `python -m finetune -m hydra/sweeper=optuna OVERRIDES` does.

    Args:
        overrides: overrides of the config, as `"study=s1"`, `"n_trials=20"` and
            `"lora.r=choice(8,16)"`.

    Returns:
        The study, with its answer.

    Raises:
        ConfigError: a value is not allowed; the message is the command's line.
        NoAnswer: no trial can win, or too many have failed; a ConfigError too.
        KeyboardInterrupt: Ctrl-C; the message says how the study is resumed.
        Interrupted: a database stays out of reach, or workers were killed again and again.
    """
    with in_process():
        folder = run_overrides(_with_sweeper(overrides), run_job, multirun=True)
    return Study(folder)


def _with_sweeper(overrides: tuple[str, ...]) -> list[str]:
    """Return the overrides with the sweeper of studies. Raises ConfigError for another one."""
    group = "hydra/sweeper"
    for override in overrides:
        key, _, value = str(override).lstrip("+").partition("=")
        if key == "resume":
            reason = "finetune.train resumes a run; sweeps.search a study, by its name"
            raise refusal(key, value, reason)
        if key == group and value != "optuna":
            reason = "sweeps.search searches with hydra/sweeper=optuna"
            raise refusal(group, value, reason)
        if key == "hydra.sweeper._target_":
            raise refusal(key, value, "must be left out: sweeps.search has its sweeper")
    others = [word for word in overrides if not str(word).startswith(f"{group}=")]
    return [f"{group}=optuna", *others]


def load_study(study: str | Path = LATEST) -> "Study":
    """Return a study that has begun, or a plain multirun as one.

    Args:
        study: its folder, its name under `outputs/sweeps`, or `latest`.

    Raises:
        ConfigError: there is no such study.
    """
    return Study(find_study(str(study)).folder)


@dataclass(frozen=True, repr=False)
class Winner(Run):
    """The run of a study's winner, with what was searched and what came of it."""

    number: int
    """The number of the trial."""
    params: dict[str, Any]
    """The values of what is searched, by their keys."""
    value: float | tuple[float, ...]
    """The objective; one value for each of several objectives."""


@dataclass(frozen=True)
class Study:
    """A study that has begun, by its folder. All properties are read when they are asked for."""

    path: Path
    """The study's folder."""

    def __repr__(self) -> str:
        study = self._stored()
        return f"<Study {os.path.relpath(self.path)}: {format_counts(study)}>"

    @property
    def name(self) -> str:
        """The study's name."""
        return self._stored().name

    @property
    def answer(self) -> dict[str, Any] | None:
        """The content of `answer.json`; None until the study has concluded with a winner."""
        answer: dict[str, Any] | None = read_json(self.path / stored.ANSWER)
        return answer

    @property
    def best(self) -> Winner:
        """The confirmed winner, or else the best trial so far.

        Its path is the study's folder `best/` once the study has concluded, else the trial's run
        folder. Of several objectives it is the first trial on the Pareto front.

        Raises:
            NoAnswer: there is no winner; the message says why. It is a ConfigError too.
        """
        study = self._stored()
        trial = find_winner(study)
        if trial is None:
            reason = why_no_winner(study.trials())
            raise NoAnswer(f"{study.name}: {reason}, so there is no best")
        values = tuple(trial.values)
        best = self.path / "best"
        has_best = (self.answer or {}).get("trial") == trial.number and best.is_dir()
        return Winner(
            path=best if has_best else run_with_adapter(study, trial).path,
            number=trial.number,
            params=point_of(trial),
            value=values[0] if len(values) == 1 else values,
        )

    def trials_dataframe(self) -> "pd.DataFrame":
        """Return all trials, a row for each.

        The columns are `number`, `state` (complete, pruned, fail, running, waiting), each objective
        by its name, each searched key as `params_KEY`, `note` as `python -m sweeps show` has it,
        and `datetime_start`, `datetime_complete` and `duration`. The objective of a trial that was
        pruned or still runs is the last one reported.
        """
        return trials_frame(self._stored())

    def report(self) -> Path:
        """Write `report.html`, as `python -m sweeps report` does, and return its path."""
        return write_report(self._stored())

    def confirm(self, top: int = TOP, seeds: int = SEEDS) -> dict[str, Any]:
        """Train the best trials and the baseline again with other seeds.

        It does what `python -m sweeps confirm` does; `best` is the confirmed winner afterwards.

        Args:
            top: number of best trials.
            seeds: number of seeds for each of them.

        Returns:
            The content of `confirm.json`.

        Raises:
            ConfigError: there is nothing to confirm, or a number is below 1.
            KeyboardInterrupt: Ctrl-C; the same call resumes.
        """
        require_positive("top", top)
        require_positive("seeds", seeds)
        with in_process():
            return confirm_study(str(self.path), top, seeds)

    def _stored(self) -> stored.Study:
        return load_stored(self.path)
