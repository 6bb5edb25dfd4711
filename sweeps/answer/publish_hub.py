"""Publish a study's winner on the hub: its adapter, with a card that has the study's trials too."""

import logging
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from finetune.files.atomic import read_json
from finetune.files.run_folder import RunFolder
from finetune.metrics.names import describe_metric
from finetune.sharing.model_card import environment
from finetune.sharing.public_values import HIDDEN, public_parameter
from finetune.sharing.publication import Extra, Target, publish_run, push_if_wanted
from finetune.sharing.upload import Uploaded
from sweeps.answer.confirmation import read_confirmation
from sweeps.answer.descriptions import confirmation_lines, final_comparison_lines
from sweeps.answer.winner import find_winner
from sweeps.space.feasibility import why_no_winner
from sweeps.study.formatting import (
    format_counts,
    objective_cells,
    parameter_names,
    short_name,
)
from sweeps.study.inside import point_of
from sweeps.study.roles import role
from sweeps.study.study import ANSWER, Study

log = logging.getLogger(__name__)

TAGS = ("optuna",)

MAX_TRIALS = 500
"""Trials in the table of a card at most, the first ones."""


def best_folder(study: Study) -> Path:
    """Return the folder of a study's winner."""
    return study.folder / "best"


def why_no_answer(study: Study) -> str | None:
    """Return why a study has no answer that could be published; None: it has one."""
    winner = find_winner(study)
    if winner is None:
        return f"{why_no_winner(study.trials())}, so there is no winner"
    folder = shlex.quote(os.path.relpath(study.folder))
    unfinished = len(study.trials(TrialState.RUNNING, TrialState.WAITING))
    if unfinished:
        count = f"{unfinished} of its trials have not ended"
        return f"{count}; python -m sweeps work {folder} trains them"
    answer = read_json(study.folder / ANSWER)
    has_adapter = RunFolder(best_folder(study)).adapter.is_dir()
    if not answer or answer["trial"] != winner.number or not has_adapter:
        return f"it has no answer yet; python -m sweeps best {folder} writes it"
    return None


def publish_winner(study: Study, target: Target) -> Uploaded:
    """Publish the winner of a study that has an answer (`why_no_answer`).

    Raises:
        ConfigError: The hub refuses, or can't be reached.
    """
    return publish_run(best_folder(study), target, study_extra(study))


def push_winner(study: Study) -> None:
    """Publish the winner if its config says so (`hub.push`); a failure is one warning."""
    line = push_if_wanted(
        best_folder(study), lambda: study_extra(study), default_name=study.name
    )
    if line is not None:
        log.info("  %s", line)


def study_extra(study: Study, sections: Sequence[str] = ()) -> Extra:
    """Return what a study adds to the card of its winner.

    Args:
        study: The study, with an answer.
        sections: Sections that follow that of the study.
    """
    return Extra(sections=(study_section(study), *sections), tags=TAGS)


def study_section(study: Study) -> str:
    """Return a card's section on a study: its conclusion, its confirmation, its trials.

    No error message and no text of a config stands in it.
    """
    answer = read_json(study.folder / ANSWER)
    trials = [trial for trial in study.trials() if trial.state != TrialState.WAITING]
    names = parameter_names(trials)
    template = environment("sweeps.answer").get_template("study_card.md.jinja")
    text: str = template.render(
        name=study.name,
        counts=format_counts(study),
        winner=answer["trial"],
        objectives=[
            f"{describe_metric(name)} ({direction.name.lower()})"
            for name, direction in zip(
                study.objectives, study.optuna.directions, strict=True
            )
        ],
        comparison=final_comparison_lines(answer),
        confirmation=_confirmation_lines(study),
        head=["trial", "state", *study.objectives, *map(short_name, names), ""],
        rows=[_row(study, trial, names) for trial in trials[:MAX_TRIALS]],
        left_out=max(len(trials) - MAX_TRIALS, 0),
    )
    return text.strip()


def _confirmation_lines(study: Study) -> list[str]:
    """Describe the confirmation without the errors of its runs, which may quote rows."""
    confirmation = read_confirmation(study)
    if confirmation is None:
        return []
    candidates: list[dict[str, Any]] = []
    for candidate in confirmation["candidates"]:
        failed = [HIDDEN] * len(candidate["failed"])
        candidates.append({**candidate, "failed": failed})
    return confirmation_lines({**confirmation, "candidates": candidates})


def _row(study: Study, trial: FrozenTrial, names: Sequence[str]) -> list[str]:
    point = point_of(trial)
    values = [
        public_parameter(name, point[name]) if name in point else "" for name in names
    ]
    return [
        str(trial.number),
        trial.state.name.lower(),
        *objective_cells(trial, len(study.objectives)),
        *values,
        role(trial),
    ]
