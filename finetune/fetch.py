"""Bring bases and data into the caches: `python -m finetune.fetch OVERRIDES`.

For machines whose jobs have no network: the login node fetches, the jobs read the caches.
"""

import argparse
import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from finetune.app import compose_sweep
from finetune.config.schema import RunConfig
from finetune.config.sections.evaluation import EvaluationSettings
from finetune.console import json_output, overrides_parser, quiet_libraries, run_command
from finetune.metrics.load import load_benchmarks
from finetune.model.source import fetch_weights
from finetune.quantities import counted
from finetune.run.resources import SharedResources

FETCHED = ("model", "dataset", "evaluation")
"""Groups of keys that name what is fetched."""


@dataclass(frozen=True)
class Fetched:
    """What is in a cache now."""

    kind: str
    """base, data or task."""
    name: str
    """As the config names it."""
    commit: str | None
    """Commit on the hub; None: not from the hub."""
    content: str
    """Its size, as shown to the user."""
    folder: str | None
    """Where a base is; the libraries know where they keep data."""


def main() -> None:
    """Read the command line, fetch, print what is there."""
    arguments = _parse_arguments()
    with json_output(arguments.json) as print_json:
        quiet_libraries()
        # Says what is read, downloaded, or only found in a cache.
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        configs = list(_configs(arguments.overrides, arguments.multirun))
        fetched = list(dict.fromkeys(_fetch_all(configs)))
        if arguments.json:
            print_json([asdict(item) for item in fetched])
            return
    for item in fetched:
        commit = f" at {item.commit[:12]}" if item.commit else ""
        print(f"{item.kind:5} {item.name}{commit}: {item.content}")


def _parse_arguments() -> argparse.Namespace:
    description = (
        "Bring the bases and the data of a run, or of a study with -m, into the caches, for "
        "machines without a network."
    )
    parser = overrides_parser("finetune.fetch", description, "model=qwen3_4b")
    parser.add_argument(
        "-m",
        "--multirun",
        action="store_true",
        help="fetch for a study or a sweep: every base and data set among its values",
    )
    return parser.parse_intermixed_args()


def _configs(overrides: list[str], multirun: bool) -> Iterator[RunConfig]:
    """Compose the config of a run, or those of a sweep that name other bases or data."""
    config, sweeper = compose_sweep(overrides, multirun)
    choices = _swept_choices(overrides, sweeper) if multirun else []
    if not choices:
        yield config
    else:
        for chosen in itertools.product(*choices):
            yield compose_sweep([*overrides, *chosen], multirun)[0]


def _swept_choices(overrides: list[str], sweeper: Mapping[str, Any]) -> list[list[str]]:
    """Return, for each swept key that names a base or data, an override for each value."""
    space = sweeper.get("params") or {}
    words = [*overrides, *(f"{key}={value}" for key, value in space.items())]
    choices = []
    for override in OverridesParser.create().parse_overrides(words):
        group = override.get_key_element().lstrip("+~").split(".")[0].split("/")[0]
        if group in FETCHED and override.is_sweep_override():
            values = override.sweep_string_iterator()
            choices.append(
                [f"{override.get_key_element()}={value}" for value in values]
            )
    return choices


def _fetch_all(configs: list[RunConfig]) -> Iterator[Fetched]:
    resources = SharedResources()
    for config in configs:
        # Rows first: mistakes in them are found in seconds, and a base may take an hour.
        rows = resources.rows(config.dataset)
        splits = ", ".join(
            f"{split} {len(part):,}" for split, part in rows.by_split.items()
        )
        for source in config.dataset.sources:
            commit = rows.commits.get(source.path)
            yield Fetched("data", source.path, commit, f"rows: {splits}", None)
        yield from _fetch_tasks(config.evaluation)
        base = resources.source(config.model)
        folder, size = fetch_weights(base, config.model)
        yield Fetched("base", base.name, base.revision, _format_size(size), str(folder))


def _format_size(size: int) -> str:
    """Return a number of bytes as megabytes or gigabytes."""
    if size < 1e9:
        return f"{size / 1e6:.0f} MB"
    return f"{size / 1e9:.1f} GB"


def _fetch_tasks(settings: EvaluationSettings) -> Iterator[Fetched]:
    """Load the tasks of lm-evaluation-harness, which fetches their documents."""
    for benchmark in load_benchmarks(settings):
        for name, task in benchmark.tasks.items():
            count = len(task.eval_docs)
            yield Fetched("task", name, None, counted(count, "document"), None)


if __name__ == "__main__":
    run_command(main)
