"""Commands on studies: `python -m sweeps COMMAND`, as in `python -m sweeps show my_study`.

A study is given by its name under `outputs/sweeps`, by its folder, or as `latest`.
"""

import argparse
import logging
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.console import command_parser, error_line, quiet_libraries, run_command
from finetune.errors import ConfigError
from sweeps.study.find_study import (
    STUDIES,
    STUDY_HELP,
    begun,
    find_search,
    find_study,
    load_study,
    study_folders,
)

if TYPE_CHECKING:
    from sweeps.study.study import Study


# Studies and their answers are imported inside the functions: they load Optuna, which `--help` and
# a mistake on the command line do not need.


def main() -> None:
    """Run the command line."""
    parser = _parser()

    def execute() -> None:
        arguments = parser.parse_args()
        arguments.action(arguments)

    run_command(execute)


def _parser() -> argparse.ArgumentParser:
    """Build the parser of all commands; `action` is the function of the chosen one."""
    parser = command_parser(
        "sweeps",
        "List and inspect studies, and act on them.",
        "list",
        "show latest",
    )
    # Python before 3.14 prints the file's name, `__main__.py`.
    parser.prog = "python -m sweeps"
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str,
        action: Callable[[argparse.Namespace], None],
        text: str,
        arguments: str = "",
    ) -> argparse.ArgumentParser:
        sentence = f"{text[0].upper()}{text[1:]}."
        example = f"{parser.prog} {name} {arguments}".strip()
        command = commands.add_parser(
            name, help=text, description=sentence, epilog=f"example: {example}"
        )
        command.set_defaults(action=action)
        return command

    def add_for_study(
        name: str,
        action: Callable[[argparse.Namespace], None],
        text: str,
        arguments: str = "s1",
    ) -> argparse.ArgumentParser:
        command = add(name, action, text, arguments)
        command.add_argument("study", metavar="S", help=STUDY_HELP)
        return command

    add("list", _list, f"list all studies under {STUDIES}")
    show = add_for_study(
        "show", _show, "list the trials of a study, or show one in full", "s1 7"
    )
    show.add_argument(
        "trial",
        type=int,
        nargs="?",
        help="number of a trial (default: all, as a table)",
    )
    diff = add_for_study(
        "diff",
        _diff,
        "show what two trials differ in: their configs and their results",
        "s1 7 0",
    )
    diff.add_argument("trials", type=int, nargs=2, metavar="TRIAL", help="two numbers")
    add_for_study(
        "best",
        _best,
        "write best/ and experiment/best.yaml again from the winner, and print the result",
    )
    stop = add_for_study(
        "stop",
        _stop,
        "stop a running trial at its next step and record it as pruned",
        "s1 7",
    )
    stop.add_argument("trial", type=int, help="number of the trial")
    report = add_for_study(
        "report",
        _report,
        "write report.html, which needs no network",
        "latest --watch",
    )
    report.add_argument(
        "--watch", action="store_true", help="update it until no trial is running"
    )
    confirm = add_for_study(
        "confirm",
        _confirm,
        "retrain the best trials with other seeds",
        "s1 --top 3 --seeds 5",
    )
    confirm.add_argument(
        "--top",
        type=_positive,
        default=3,
        help="number of best trials (default 3)",
    )
    confirm.add_argument(
        "--seeds",
        type=_positive,
        default=5,
        help="number of seeds (default 5)",
    )
    return parser


def _positive(text: str) -> int:
    """Parse a positive integer for argparse."""
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, at least 1")
    return number


def _find_study_for_work(name: str) -> "Study":
    """Load a study whose runs will be loaded or trained, and print log lines on the terminal."""
    study = find_search(name)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quiet_libraries(bars=False)
    return study


def _list(arguments: argparse.Namespace) -> None:
    from sweeps.study.formatting import format_table

    folders = study_folders()
    if not folders:
        print(f"no studies under {STUDIES}")
        return
    rows = [_list_row(folder) for folder in folders]
    print(format_table(["study", "begun", "trials", "objective", "best"], rows))


def _list_row(folder: Path) -> list[str]:
    """Name, start, trial count and best value of the study in a folder."""
    from optuna.trial import TrialState

    from sweeps.study.formatting import objective_cells

    start = time.strftime("%Y-%m-%d %H:%M", time.localtime(begun(folder)))
    try:
        # Without retries: a database out of reach must not hold up the list of all studies.
        study = load_study(folder, retry_seconds=0)
    # Its database can't be reached, or its files are damaged.
    except Exception as error:
        return [folder.name, start, "", "", error_line(error)]
    counts = f"{len(study.finished())}/{len(study.trials())}"
    ranked = study.ranked()
    value = ""
    if not ranked and study.trials(TrialState.COMPLETE):
        value = "none feasible"
    if ranked:
        cells = objective_cells(ranked[0], len(study.objectives))
        value = " ".join(cells)
    return [study.name, start, counts, " ".join(study.objectives), value]


def _show(arguments: argparse.Namespace) -> None:
    from sweeps.study.budget import describe_tokens
    from sweeps.study.formatting import trials_table
    from sweeps.study.multirun_folder import is_multirun
    from sweeps.study.trial_text import trial_text

    study = find_study(arguments.study)
    if arguments.trial is not None:
        print(trial_text(study, arguments.trial))
        return
    print(trials_table(study, is_ranked=is_multirun(study)))
    tokens = describe_tokens(study)
    if tokens:
        print(tokens)


def _diff(arguments: argparse.Namespace) -> None:
    from sweeps.study.trial_text import difference_text

    print(difference_text(find_study(arguments.study), arguments.trials))


def _best(arguments: argparse.Namespace) -> None:
    study = _find_study_for_work(arguments.study)
    if not study.ranked():
        from sweeps.space.feasibility import why_no_winner

        reason = why_no_winner(study.trials())
        raise ConfigError(f"{arguments.study}: {reason}, so there is no best")
    _conclude(study)


def _conclude(study: "Study") -> None:
    from sweeps.answer.conclusion import conclude

    conclude(study)


def _report(arguments: argparse.Namespace) -> None:
    from sweeps.answer.report import watch, write_report

    study = find_study(arguments.study)
    if arguments.watch:
        watch(study, lambda line: print(line, flush=True))
        return
    path = write_report(study)
    print(os.path.relpath(path))


def _confirm(arguments: argparse.Namespace) -> None:
    study = _find_study_for_work(arguments.study)
    # Loads torch: after a wrong name is refused, and after the libraries are quiet.
    from sweeps.answer.confirm import confirm

    confirm(study, arguments.seeds, arguments.top)
    _conclude(study)


def _stop(arguments: argparse.Namespace) -> None:
    from optuna.trial import TrialState

    study = find_search(arguments.study)
    running = [trial.number for trial in study.trials(TrialState.RUNNING)]
    if arguments.trial not in running:
        numbers = ", ".join(map(str, running)) or "none"
        raise ConfigError(
            f"trial {arguments.trial}: is not running; running: {numbers}"
        )
    study.request_stop(arguments.trial)
    command = f"python -m sweeps show {shlex.quote(arguments.study)}"
    print(f"trial {arguments.trial} stops at its next step; check with: {command}")


if __name__ == "__main__":
    main()
