"""Arguments that several commands on a run share."""

import argparse

from finetune.console import CommandParser, add_json_argument, command_parser
from finetune.files.find_run import RUN_HELP

DTYPES = ("bfloat16", "float16", "float32")
"""What merged weights may be rounded to."""


def run_parser(module: str, description: str, *examples: str) -> CommandParser:
    """Return the parser of a command on a run, with RUN and `--json`.

    Arguments: those of `command_parser`.
    """
    parser = command_parser(module, description, *examples)
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    add_json_argument(parser)
    return parser


def add_merged_arguments(
    parser: argparse.ArgumentParser, content: str, dtype: str
) -> None:
    """Add the arguments of a command that merges the adapter into its base.

    Args:
        parser: The command's parser.
        content: What the new folder gets, for the help.
        dtype: The default of the weights.
    """
    parser.add_argument(
        "--to", metavar="FOLDER", required=True, help=f"a new folder for {content}"
    )
    parser.add_argument(
        "--dtype",
        default=dtype,
        choices=DTYPES,
        help=f"dtype of merged weights that are not quantised (default: {dtype})",
    )
