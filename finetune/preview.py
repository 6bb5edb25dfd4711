"""Look at a run's rows: `python -m finetune.preview OVERRIDES`. Loads no weights, writes nothing.

The first rows of a split as the model sees them, what becomes of all rows, and their lengths.
"""

import argparse

from finetune.app import compose_run
from finetune.compat import import_transformers_without_torch
from finetune.config.schema import RunConfig
from finetune.console import (
    json_output,
    overrides_parser,
    quiet_libraries,
    run_command,
)
from finetune.data.rows import SPLITS
from finetune.errors import ConfigError, refusal
from finetune.run.preview import Preview, collect_notes, preview_rows
from finetune.run.resources import SharedResources


def main() -> None:
    """Read the command line, encode the rows, print them."""
    arguments = _parse_arguments()
    config = compose_run(arguments.overrides)
    with json_output(arguments.json) as print_json:
        preview = _preview(config, arguments.part, arguments.rows)
        if arguments.json:
            print_json(preview.to_dict())
            return
    from finetune.run.preview_text import print_preview

    print_preview(preview, arguments.part, config.dataset)


def _parse_arguments() -> argparse.Namespace:
    description = "Show rows as the model sees them, and what becomes of all rows."
    parser = overrides_parser(
        "finetune.preview", description, "dataset.path=./mine.jsonl --rows 5"
    )
    parser.add_argument(
        "--rows",
        metavar="N",
        type=int,
        default=3,
        help="number of rows to show (default: 3)",
    )
    parser.add_argument(
        "--part",
        choices=SPLITS,
        default=SPLITS[0],
        help="the part of the data to show, its first rows by file and number (default: train)",
    )
    arguments = parser.parse_intermixed_args()
    if arguments.rows < 1:
        raise refusal("--rows", arguments.rows, "must be at least 1")
    return arguments


def _preview(config: RunConfig, split: str, count: int) -> Preview:
    resources = SharedResources()
    with collect_notes() as notes:
        rows = resources.rows(config.dataset)
        if not rows.by_split[split]:
            raise _no_rows(config, split)
        # Before torch is hidden from transformers: the packaged model is converted with torch.
        resources.source(config.model)
        if not config.model.trust_remote_code:
            import_transformers_without_torch()
        quiet_libraries()
        return preview_rows(config, resources, split, count, notes)


def _no_rows(config: RunConfig, split: str) -> ConfigError:
    fraction = getattr(config.dataset, f"{split}_fraction")
    reason = (
        f"has no rows: dataset.{split}_fraction={fraction}, dataset.{split}_path=null"
    )
    return refusal("--part", split, f"{reason}, and no file is named for it")


if __name__ == "__main__":
    run_command(main)
