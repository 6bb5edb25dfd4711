"""The arguments of commands that publish a run."""

import argparse


def add_publish_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say where a run is published, and how much of it."""
    flag = argparse.BooleanOptionalAction
    parser.add_argument(
        "--to",
        metavar="OWNER/NAME",
        help="the repository (default: hub.model_id of its config, or its name)",
    )
    parser.add_argument(
        "--private",
        action=flag,
        help="whether a new repository is private (default: hub.private of its config)",
    )
    parser.add_argument(
        "--samples",
        action=flag,
        help="whether the card shows prompts and answers (default: hub.samples)",
    )
