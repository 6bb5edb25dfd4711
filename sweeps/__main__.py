"""Commands on studies: `python -m sweeps COMMAND`, as in `python -m sweeps show my_study`.

A study is given by its name under `outputs/sweeps`, by its folder, or as `latest`.
"""

import argparse
from collections.abc import Callable

from finetune.console import command_parser, run_command
from sweeps.commands import act, inspect, points
from sweeps.study.find_study import STUDIES, STUDY_HELP

VALUES_HELP = "searched keys and their values"


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

    add("list", inspect.list_studies, f"list all studies under {STUDIES}")
    show = add_for_study(
        "show", inspect.show, "list the trials of a study, or show one in full", "s1 7"
    )
    show.add_argument(
        "trial",
        type=int,
        nargs="?",
        help="number of a trial (default: all, as a table)",
    )
    diff = add_for_study(
        "diff",
        inspect.diff,
        "show what two trials differ in: their configs and their results",
        "s1 7 0",
    )
    diff.add_argument("trials", type=int, nargs=2, metavar="TRIAL", help="two numbers")
    add_for_study(
        "best",
        act.best,
        "write best/ and experiment/best.yaml again from the winner, and print the result",
    )
    stop = add_for_study(
        "stop",
        act.stop,
        "stop a running trial at its next step and record it as pruned",
        "s1 7",
    )
    stop.add_argument("trial", type=int, help="number of the trial")
    new_point = add_for_study(
        "add",
        points.add,
        "add a trial with a point, on top of n_trials, also while the study runs",
        "s1 lora.r=8 lora.alpha=16",
    )
    new_point.add_argument("values", nargs="+", metavar="KEY=VALUE", help=VALUES_HELP)
    copy = add_for_study(
        "clone",
        points.clone,
        "add a trial with the point of another one and some changes",
        "s1 7 lora.r=8",
    )
    copy.add_argument("trial", type=int, help="number of the trial")
    copy.add_argument("values", nargs="+", metavar="KEY=VALUE", help=VALUES_HELP)
    report = add_for_study(
        "report",
        act.report,
        "write report.html, which needs no network",
        "latest --watch",
    )
    report.add_argument(
        "--watch", action="store_true", help="update it until no trial is running"
    )
    confirm = add_for_study(
        "confirm",
        act.confirm,
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


if __name__ == "__main__":
    main()
