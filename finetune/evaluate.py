"""Evaluate a run's adapter on other data: `python -m finetune.evaluate RUN --data FILE`.

The base is evaluated on the same rows, without the adapter.
"""

import argparse
import dataclasses
import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.config.data_folder import ANY_FILE
from finetune.console import command_parser, log_to_stderr, run_command
from finetune.data.rows import load_all_rows
from finetune.data.tokens import tokenize
from finetune.run.load import load_run, read_run_config

if TYPE_CHECKING:
    from finetune.engine.evaluation import Evaluation


log = logging.getLogger(__name__)

METRICS = ("loss", "perplexity", "accuracy")
"""Attributes of an `Evaluation`, in the order of the table."""


@dataclass(frozen=True)
class Comparison:
    """Metrics of a base alone and with its adapter, on the same rows."""

    rows: int
    base: "Evaluation"
    adapter: "Evaluation"

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics as `--json` prints them."""
        return {
            "rows": self.rows,
            "tokens": self.adapter.tokens,
            "base": {name: getattr(self.base, name) for name in METRICS},
            "adapter": {name: getattr(self.adapter, name) for name in METRICS},
        }


def main() -> None:
    """Read the command line, evaluate base and adapter on the rows, print both."""
    arguments = _parse_arguments()
    # Files of a folder that are read, and rows that are left out, too.
    log_to_stderr(__name__, "finetune.data", "finetune.run.load")
    comparison = _compare(arguments.run, arguments.data)
    if arguments.json:
        content = {"data": arguments.data, **comparison.to_dict()}
        print(json.dumps(content, indent=2))
    else:
        _print_table(arguments.data, comparison)


def _parse_arguments() -> argparse.Namespace:
    description = "Evaluate the adapter of a run and its base on other data."
    parser = command_parser("finetune.evaluate", description)
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument(
        "--data",
        metavar="DATA",
        required=True,
        help=f"a {ANY_FILE}, its URL, a hub id, or a folder: its test files, or all its files if "
        "none is named test",
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON instead of a table"
    )
    return parser.parse_args()


def _compare(folder: str, data: str) -> Comparison:
    """Evaluate a run's base without and with the adapter.

    Args:
        folder: the run folder.
        data: the path or hub id of the rows.
    """
    config = read_run_config(folder)
    settings = dataclasses.replace(config.dataset, path=data, packing=False)
    rows = load_all_rows("--data", settings)

    # Imports torch, so only after all that is refused without it.
    from finetune.engine.evaluation import evaluate

    run = load_run(folder)
    tokens = tokenize(
        "test", rows, run.tokenizer, settings, run.config.model.template_kwargs
    )
    batch_size = config.trainer.per_device_eval_batch_size
    # The base first: attaching the adapter may change it.
    log.info("evaluating the base")
    base = evaluate(run.base, tokens, batch_size, config.quantization)
    log.info("evaluating the adapter")
    adapter = evaluate(
        run.with_adapter(),
        tokens,
        batch_size,
        config.quantization,
    )
    return Comparison(len(tokens), base, adapter)


def _print_table(data: str, comparison: Comparison) -> None:
    print(
        f"{comparison.rows} rows, {comparison.adapter.tokens} answer tokens of {data}"
    )
    print(f"{'':12}{'base':>10}{'adapter':>10}{'change':>10}")
    for name in METRICS:
        base = getattr(comparison.base, name)
        adapter = getattr(comparison.adapter, name)
        change = adapter / base - 1 if base else 0
        print(f"{name:12}{base:10.4f}{adapter:10.4f}{change:+10.1%}")


if __name__ == "__main__":
    run_command(main)
