"""Commands that act on a study: best, report, confirm, stop."""

import argparse
import logging
import os
import shlex
from typing import TYPE_CHECKING, Any

from finetune.console import quiet_libraries
from finetune.errors import ConfigError, NoAnswer
from finetune.files.atomic import read_json
from sweeps.study.find_study import find_search, find_study

if TYPE_CHECKING:
    from sweeps.study.study import Study

TOP = 3
"""Default number of best trials that are confirmed."""

SEEDS = 5
"""Default number of seeds with which each of them is trained again."""

# Studies and their answers are imported inside the functions: they load Optuna, which `--help` and
# a mistake on the command line do not need.


def _find_study_for_work(name: str) -> "Study":
    """Load a study whose runs will be loaded or trained, and print log lines on the terminal."""
    study = find_search(name)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quiet_libraries(bars=False)
    return study


def best(arguments: argparse.Namespace) -> None:
    """Write the winner and the answer again."""
    study = _find_study_for_work(arguments.study)
    if not study.ranked():
        from sweeps.space.feasibility import why_no_winner

        reason = why_no_winner(study.trials())
        raise NoAnswer(f"{arguments.study}: {reason}, so there is no best")
    _conclude(study)
    if arguments.json:
        arguments.print_json(_answer(study))


def _conclude(study: "Study") -> None:
    from sweeps.answer.conclusion import conclude

    conclude(study)


def _answer(study: "Study") -> dict[str, Any]:
    """Return a study's answer for `--json`."""
    from sweeps.study.study import ANSWER

    answer = read_json(study.folder / ANSWER)
    folder = os.path.relpath(study.folder)
    return {"study": study.name, "folder": folder, "answer": answer}


def report(arguments: argparse.Namespace) -> None:
    """Write the report."""
    if arguments.watch and arguments.json:
        raise ConfigError("argument --json: not allowed with argument --watch")
    from sweeps.answer.report import watch, write_report

    study = find_study(arguments.study)
    if arguments.watch:
        watch(study, lambda line: print(line, flush=True))
        return
    path = os.path.relpath(write_report(study))
    if arguments.json:
        arguments.print_json({"study": study.name, "report": path})
    else:
        print(path)


def confirm(arguments: argparse.Namespace) -> None:
    """Train the best trials again with other seeds."""
    confirmation = confirm_study(arguments.study, arguments.top, arguments.seeds)
    if arguments.json:
        answer = _answer(find_search(arguments.study))
        content = {**answer, "confirmation": confirmation}
        arguments.print_json(content)


def confirm_study(name: str, top: int, seeds: int) -> dict[str, Any]:
    """Train the best trials again with other seeds, and write the answer again.

    Args:
        name: the study: its folder, its name, or `latest`.
        top: number of best trials.
        seeds: number of seeds for each trial.

    Returns:
        The content of `confirm.json`.

    Raises:
        ConfigError: there is no such study, or nothing to confirm.
    """
    study = _find_study_for_work(name)
    # Loads torch: after a wrong name is refused, and after the libraries are quiet.
    from sweeps.answer.confirm import confirm

    confirmation = confirm(study, seeds, top)
    _conclude(study)
    return confirmation


def stop(arguments: argparse.Namespace) -> None:
    """Ask the worker of a running trial to end it."""
    from optuna.trial import TrialState

    study = find_search(arguments.study)
    running = [trial.number for trial in study.trials(TrialState.RUNNING)]
    if arguments.trial not in running:
        numbers = ", ".join(map(str, running)) or "none"
        raise ConfigError(
            f"trial {arguments.trial}: is not running; running: {numbers}"
        )
    study.request_stop(arguments.trial)
    if arguments.json:
        arguments.print_json({"study": study.name, "trial": arguments.trial})
        return
    command = f"python -m sweeps show {shlex.quote(arguments.study)}"
    print(f"trial {arguments.trial} stops at its next step; check with: {command}")
