"""Commands on studies: `python -m sweeps list | show S | best S | stop S 7 | report S | confirm S`.

S is a study's name or its folder.
"""

import argparse
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.console import command_parser, one_line, run_command
from finetune.errors import ConfigError

if TYPE_CHECKING:
    from sweeps.study.study import Study


STUDIES = Path("outputs/sweeps")


def main() -> None:
    """The command line."""
    parser = command_parser("Look at studies, and act on them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, action: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.error = parser.error  # type: ignore[method-assign]
        command.set_defaults(action=action)
        return command

    add("list", _list, "all studies under outputs/sweeps")
    for name, action, text in (
        ("show", _show, "a study's trials"),
        ("best", _best, "take the winner anew: best/, experiment/best.yaml, and how to use them"),
        ("stop", _stop, "end a running trial at its next step; it is recorded as pruned"),
        ("report", _report, "write report.html, which needs no network"),
        ("confirm", _confirm, "train the best trials anew with other seeds: was the winner luck?"),
    ):
        command = add(name, action, text)
        command.add_argument("study", metavar="S", help="a study's name, or its folder")
        if name == "stop":
            command.add_argument("trial", type=int, help="its number")
        if name == "report":
            command.add_argument("--watch", action="store_true", help="again and again, while the study runs")
        if name == "confirm":
            command.add_argument("--top", type=_positive, default=3, help="how many of the best (3)")
            command.add_argument("--seeds", type=_positive, default=5, help="how many other seeds (5)")

    def act() -> None:
        arguments = parser.parse_args()
        arguments.action(arguments)

    run_command(act)


def _study(name: str) -> "Study":
    from sweeps.study.study import Study

    for folder in (Path(name), STUDIES / name):
        if (folder / "study.json").is_file():
            return Study.load(folder.absolute())
    known = sorted(path.parent.name for path in STUDIES.glob("*/study.json"))
    raise ConfigError(f"{name}: no such study; allowed: a study's folder, or one of {', '.join(known) or 'none yet'}")


def _list(arguments: argparse.Namespace) -> None:
    from sweeps.study.formatting import format_table, objective_cells
    from sweeps.study.study import Study

    rows = []
    for path in sorted(STUDIES.glob("*/study.json"), key=os.path.getmtime):
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        try:
            study = Study.load(path.parent.absolute(), patience=0)
        except Exception as error:  # its database is out of reach, or its files are broken
            rows.append([path.parent.name, began, "", one_line(error)])
            continue
        best = next(iter(study.ranked()), None)
        value = " ".join(objective_cells(best, len(study.objectives))) if best else ""
        rows.append([study.name, began, f"{len(study.finished())}/{len(study.trials())}", value])
    print(format_table(["study", "begun", "trials", "best"], rows) if rows else f"no studies under {STUDIES}")


def _show(arguments: argparse.Namespace) -> None:
    from sweeps.study.formatting import trials_table

    study = _study(arguments.study)
    print(trials_table(study))


def _best(arguments: argparse.Namespace) -> None:
    study = _prepared(arguments.study)
    if not study.ranked():
        raise ConfigError(f"{arguments.study}: no trial is complete yet, so there is no best")
    _conclude(study)


def _prepared(name: str) -> "Study":
    """A study whose runs are to be loaded or trained, with its lines on the terminal."""
    import logging

    from finetune.console import quiet_libraries

    study = _study(name)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quiet_libraries(bars=False)
    return study


def _conclude(study: "Study") -> None:
    from finetune.run.resources import shared_resources
    from sweeps.answer.conclusion import conclude

    conclude(study, shared_resources)


def _report(arguments: argparse.Namespace) -> None:
    from sweeps.answer.report import watch, write_report

    study = _study(arguments.study)
    if arguments.watch:
        watch(study, lambda line: print(line, flush=True))
    else:
        print(os.path.relpath(write_report(study)))


def _confirm(arguments: argparse.Namespace) -> None:
    from sweeps.answer.confirm import confirm

    study = _prepared(arguments.study)
    confirm(study, arguments.seeds, arguments.top)
    _conclude(study)


def _positive(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, at least 1")
    return number


def _stop(arguments: argparse.Namespace) -> None:
    from optuna.trial import TrialState

    study = _study(arguments.study)
    running = {trial.number: trial for trial in study.trials(TrialState.RUNNING)}
    if arguments.trial not in running:
        names = ", ".join(map(str, running)) or "none"
        raise ConfigError(f"trial {arguments.trial}: is not running; running: {names}")
    study.storage.set_trial_user_attr(running[arguments.trial]._trial_id, "stop", True)
    print(f"trial {arguments.trial} ends at its next step; python -m sweeps show {shlex.quote(arguments.study)}")


if __name__ == "__main__":
    main()
