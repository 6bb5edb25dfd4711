"""Publish a run on the Hugging Face hub: `python -m finetune.publish RUN --to OWNER/NAME`.

The repository gets the adapter, its tokenizer, a model card that is written from the run's files,
and the base's licence.
"""

import argparse

from finetune.console import json_output, log_to_stderr, run_command
from finetune.files.find_run import find_run
from finetune.run_arguments import run_parser
from finetune.sharing.arguments import add_publish_arguments

LOGGERS = ("finetune.sharing",)
"""Loggers whose lines the command prints."""


def main() -> None:
    """Read the command line, publish, print where."""
    arguments = _parse_arguments()
    folder = find_run("RUN", arguments.run)
    log_to_stderr(*LOGGERS)
    # Loads numpy and Jinja, which `--help` does not need.
    from finetune.sharing.publication import (
        describe_published,
        find_target,
        publish_run,
        published_value,
    )

    with json_output(arguments.json) as print_json:
        target = find_target(folder, arguments.to, arguments.private, arguments.samples)
        uploaded = publish_run(folder, target)
        if arguments.json:
            print_json(published_value(uploaded, target))
            return
    print(describe_published(uploaded))


def _parse_arguments() -> argparse.Namespace:
    parser = run_parser(
        "finetune.publish",
        "Publish the adapter of a run on the Hugging Face hub, with a model card.",
        "latest --to me/my-adapter",
    )
    add_publish_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
