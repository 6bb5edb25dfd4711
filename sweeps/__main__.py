"""Commands on studies: `python -m sweeps COMMAND`, as in `python -m sweeps show my_study`.

A study is given by its name under `outputs/sweeps`, by its folder, or as `latest`.
"""

import argparse
from collections.abc import Callable

from finetune.console import (
    add_json_argument,
    command_parser,
    json_output,
    run_command,
)
from finetune.files.find_run import STUDIES
from finetune.sharing.arguments import add_publish_arguments
from sweeps.commands import act, inspect, points, share, watch, work
from sweeps.study.find_study import STUDY_HELP

PROGRAM = "python -m sweeps"

DEFAULT_PORT = 8321
"""The port of `watch`: a fixed one, so that a bookmark and a tunnel to it stay valid."""

VALUES_HELP = "searched keys and their values"


def main() -> None:
    """Run the command line."""
    parser = _parser()

    def execute() -> None:
        arguments = parser.parse_args()
        with json_output(arguments.json) as arguments.print_json:
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
    parser.prog = PROGRAM
    commands = _Commands(parser)
    for add_command in (
        _add_list,
        _add_show,
        _add_diff,
        _add_best,
        _add_stop,
        _add_add,
        _add_clone,
        _add_work,
        _add_report,
        _add_watch,
        _add_confirm,
        _add_publish,
        _add_promote,
    ):
        add_command(commands)
    return parser


class _Commands:
    """The commands of a parser, each with its parser, help and example."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parsers = parser.add_subparsers(
            dest="command", required=True, metavar="COMMAND"
        )

    def add(
        self,
        name: str,
        action: Callable[[argparse.Namespace], None],
        text: str,
        arguments: str = "",
    ) -> argparse.ArgumentParser:
        """Add a command, with an example of its arguments in its help."""
        sentence = f"{text[0].upper()}{text[1:]}."
        example = f"{PROGRAM} {name} {arguments}".strip()
        parser = self._parsers.add_parser(
            name, help=text, description=sentence, epilog=f"example: {example}"
        )
        parser.set_defaults(action=action)
        add_json_argument(parser)
        return parser

    def add_for_study(
        self,
        name: str,
        action: Callable[[argparse.Namespace], None],
        text: str,
        arguments: str = "s1",
    ) -> argparse.ArgumentParser:
        """Add a command whose first argument is a study."""
        parser = self.add(name, action, text, arguments)
        parser.add_argument("study", metavar="S", help=STUDY_HELP)
        return parser


def _add_list(commands: _Commands) -> None:
    text = f"list all studies under {STUDIES}"
    commands.add("list", inspect.list_studies, text)


def _add_show(commands: _Commands) -> None:
    text = "list the trials of a study, or show one in full"
    parser = commands.add_for_study("show", inspect.show, text, "s1 7")
    parser.add_argument(
        "trial",
        type=int,
        nargs="?",
        help="number of a trial (default: all, as a table)",
    )


def _add_diff(commands: _Commands) -> None:
    text = "show what two trials differ in: their configs and their results"
    parser = commands.add_for_study("diff", inspect.diff, text, "s1 7 0")
    numbers = "two numbers"
    parser.add_argument("trials", type=int, nargs=2, metavar="TRIAL", help=numbers)


def _add_best(commands: _Commands) -> None:
    text = "write best/ and experiment/best.yaml again from the winner, and print the result"
    commands.add_for_study("best", act.best, text)


def _add_stop(commands: _Commands) -> None:
    text = "stop a running trial at its next step and record it as pruned"
    parser = commands.add_for_study("stop", act.stop, text, "s1 7")
    parser.add_argument("trial", type=int, help="number of the trial")


def _add_add(commands: _Commands) -> None:
    text = "add a trial with a point, on top of n_trials, also while the study runs"
    example = "s1 lora.r=8 lora.alpha=16"
    parser = commands.add_for_study("add", points.add, text, example)
    parser.add_argument("values", nargs="+", metavar="KEY=VALUE", help=VALUES_HELP)


def _add_clone(commands: _Commands) -> None:
    text = "add a trial with the point of another one and some changes"
    parser = commands.add_for_study("clone", points.clone, text, "s1 7 lora.r=8")
    parser.add_argument("trial", type=int, help="number of the trial")
    parser.add_argument("values", nargs="+", metavar="KEY=VALUE", help=VALUES_HELP)


def _add_work(commands: _Commands) -> None:
    text = "train trials of a study on this machine too; Ctrl-C gives them back"
    example = "s1 --storage postgresql://user@host/db"
    parser = commands.add_for_study("work", work.work, text, example)
    text = "address of its database, where its folder is not here; a password in the environment"
    parser.add_argument("--storage", metavar="ADDRESS", help=text)
    text = "this machine's launcher, number of workers or time limit, as hydra.sweeper.n_jobs=2"
    parser.add_argument(
        "--override",
        nargs="+",
        metavar="KEY=VALUE",
        default=[],
        help=text,
    )


def _add_report(commands: _Commands) -> None:
    text = "write report.html, which needs no network"
    parser = commands.add_for_study("report", act.report, text, "latest --watch")
    text = "update it until no trial is running"
    parser.add_argument("--watch", action="store_true", help=text)


def _add_watch(commands: _Commands) -> None:
    text = "show the report in a browser while the study runs, until Ctrl-C"
    parser = commands.add_for_study("watch", watch.watch, text)
    port = f"port on 127.0.0.1 (default {DEFAULT_PORT}; 0: a free one)"
    parser.add_argument("--port", type=_port, default=DEFAULT_PORT, help=port)


def _add_confirm(commands: _Commands) -> None:
    text = "retrain the best trials with other seeds"
    example = "s1 --top 3 --seeds 5"
    parser = commands.add_for_study("confirm", act.confirm, text, example)
    top = f"number of best trials (default {act.TOP})"
    parser.add_argument("--top", type=_positive, default=act.TOP, help=top)
    seeds = f"number of seeds (default {act.SEEDS})"
    parser.add_argument("--seeds", type=_positive, default=act.SEEDS, help=seeds)


def _add_publish(commands: _Commands) -> None:
    text = (
        "publish the winner's adapter on the Hugging Face hub, with a card of the study"
    )
    example = "s1 --to me/my-adapter"
    parser = commands.add_for_study("publish", share.publish, text, example)
    add_publish_arguments(parser)


def _add_promote(commands: _Commands) -> None:
    text = "register the winner if it is better than the deployed adapter (else exit code 5)"
    example = (
        "s1 --against deployed --data test.jsonl --metric test/exact_match --to mlflow"
    )
    parser = commands.add_for_study("promote", share.promote, text, example)
    against = (
        "the deployed adapter: a run folder, an adapter's folder, or none where the alias is still "
        "free: then nothing is compared"
    )
    parser.add_argument("--against", metavar="RUN", required=True, help=against)
    data = "rows that both answer: a file, its URL, a folder, or a hub id"
    parser.add_argument("--data", required=True, help=data)
    metric = "test/loss, test/exact_match or another metric of rows"
    parser.add_argument("--metric", required=True, help=metric)
    gain = "the lower end of the gain's 95 %% interval must be above it (default 0)"
    parser.add_argument("--min-gain", type=float, default=0.0, help=gain)
    parser.add_argument("--to", required=True, choices=share.REGISTRIES)
    alias = "what marks the deployed version (default champion); on the hub a branch"
    parser.add_argument("--alias", default="champion", help=alias)
    name = (
        "registered model, artifact or OWNER/NAME (default: tracker.project or finetune; on the "
        "hub hub.model_id)"
    )
    parser.add_argument("--name", help=name)


def _port(text: str) -> int:
    """Parse a port for argparse."""
    if not text.isdigit() or int(text) > 65535:
        allowed = "must be a whole number from 0 to 65535"
        raise argparse.ArgumentTypeError(f"{text}: {allowed}")
    return int(text)


def _positive(text: str) -> int:
    """Parse a positive integer for argparse."""
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, at least 1")
    return number


if __name__ == "__main__":
    main()
