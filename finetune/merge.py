"""Merge a run's adapter into its base: `python -m finetune.merge RUN --to FOLDER`."""

import argparse
import shlex

from finetune.config.override_text import override_text
from finetune.console import json_output, log_to_stderr, run_command
from finetune.files.find_run import find_run
from finetune.files.output_paths import new_folder
from finetune.run.merging import LOGGERS, MergedModel, merge_run
from finetune.run_arguments import add_merged_arguments, run_parser


def main() -> None:
    """Read the command line, merge, save, print the differences that merging and rounding leave."""
    arguments = _parse_arguments()
    folder = new_folder("--to", arguments.to)
    run_folder = find_run("RUN", arguments.run)
    log_to_stderr(*LOGGERS)
    with json_output(arguments.json) as print_json:
        merged = merge_run(run_folder, folder, arguments.dtype)
        if arguments.json:
            print_json(merged.to_dict())
        else:
            _print_lines(merged)


def _print_lines(merged: MergedModel) -> None:
    override = f"model.name_or_path={override_text(str(merged.path))}"
    start = f"python -m finetune {shlex.quote(override)}"
    print(f"merged model in {merged.path}: {start} starts from it")
    print(
        "largest difference of a log-probability on a fixed text, against the adapter on its "
        "quantised base:"
    )
    print(
        f"{merged.difference:.1e} before rounding and {merged.difference_rounded:.1e} "
        f"after rounding to {merged.dtype}"
    )
    print(merged.verdict)


def _parse_arguments() -> argparse.Namespace:
    parser = run_parser(
        "finetune.merge",
        "Merge the adapter of a run into its base.",
        "latest --to merged",
    )
    add_merged_arguments(parser, "the merged model", "bfloat16")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
