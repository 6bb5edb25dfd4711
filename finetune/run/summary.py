"""The summary that a run prints at its end."""

import logging
import os
import shlex
from typing import Any

from finetune.config.sections.evaluation import LOSS_METRICS
from finetune.files.atomic import read_json, read_json_list
from finetune.files.run_folder import Metrics, RunFolder
from finetune.metrics.classification import Classification, confusion_lines
from finetune.metrics.names import describe_metric
from finetune.run.result import Result
from finetune.tracking.tracker import Tracker

log = logging.getLogger(__name__)

Fact = tuple[str, str]
"""A name and what is said under it."""


def print_summary(
    folder: RunFolder,
    result: Result,
    recorded: dict[str, Any],
    tracker: Tracker,
) -> None:
    """Print what was learnt, what it took, where the adapter is, and how to use it.

    Args:
        folder: The run folder.
        result: The run's result.
        recorded: The same as `result.json` has it.
        tracker: Says where the run can be looked at.
    """
    facts = [
        *_quality(result, recorded),
        *_confusion(folder),
        *_cost(recorded),
        *_answers(folder),
        *_next_steps(folder, tracker),
    ]
    lines = [f"{result.status}: {result.config.name}", *_fact_lines(facts)]
    # One record: in a pack, no line of another run comes between.
    log.info("%s", "\n".join(lines))


def _fact_lines(facts: list[Fact]) -> list[str]:
    """Format facts; further lines of a text are indented under its first one."""
    lines = []
    for name, text in facts:
        for index, line in enumerate(text.splitlines() or [""]):
            label = "" if index else name
            lines.append(f"  {label:14} {line}".rstrip())
    return lines


def _quality(result: Result, recorded: dict[str, Any]) -> list[Fact]:
    """Losses on held-out rows and test rows, in nats per token."""
    metrics = result.metrics
    counts = recorded["rows"]
    facts: list[Fact] = []
    if result.progress and result.progress.rungs:
        before = result.progress.rungs[0]["metrics"]["eval/loss"]
        after = metrics["eval/loss"]
        change = after / before - 1
        rows = counts["eval"]
        losses = f"{before:.3f} -> {after:.3f} ({change:+.1%}) on {rows} rows"
        facts.append(("held-out loss", losses))
        first = result.progress.rungs[0]["metrics"]
        facts += _scores(metrics, first)
    if "test/loss" in metrics:
        loss = metrics["test/loss"]
        rows = counts["test"]
        text = f"{loss:.3f} on {rows} rows that no decision has used"
        facts.append(("test loss", text))
    return facts


def _confusion(folder: RunFolder) -> list[Fact]:
    """The labels of the test rows against the most likely ones."""
    evaluation = read_json(folder.test_rows) or {}
    classification = evaluation.get("classification")
    if classification is None:
        return []
    lines = confusion_lines(Classification.from_dict(classification))
    return [("test labels" if line is lines[0] else "", line) for line in lines]


def _scores(metrics: Metrics, first: Metrics) -> list[Fact]:
    """The scores of generated answers on held-out rows, from the first evaluation to the last."""
    facts: list[Fact] = []
    for name, value in metrics.items():
        split, _, score = name.partition("/")
        if split != "eval" or score in LOSS_METRICS:
            continue
        before = f"{first[name]:.4f} -> " if name in first else ""
        test = metrics.get(f"test/{score}")
        of_test = "" if test is None else f", {test:.4f} on test rows"
        facts.append((describe_metric(score), f"{before}{value:.4f}{of_test}"))
    return facts


def _cost(recorded: dict[str, Any]) -> list[Fact]:
    """Speed and memory."""
    speed = recorded["tokens_per_second"]
    if not speed:
        return []
    tokens = recorded["train_tokens"]
    seconds = recorded["train_seconds"]
    memory = recorded["peak_memory_bytes"] / 2**30
    return [
        ("speed", f"{speed:.0f} tokens/s: {tokens} tokens in {seconds:.0f} s"),
        ("peak memory", f"{memory:.1f} GiB"),
    ]


def _answers(folder: RunFolder) -> list[Fact]:
    """The sample prompts with their answers before and after training."""
    facts: list[Fact] = []
    for sample in read_json_list(folder.samples):
        facts.append(("prompt", sample["prompt"]))
        for when in ("before", "after"):
            facts.append((f"  {when}", sample.get(when, "").strip()))
    return facts


def _next_steps(folder: RunFolder, tracker: Tracker) -> list[Fact]:
    """Where the adapter is, the command that uses it, and where the run can be looked at."""
    run = shlex.quote(os.path.relpath(folder.path))
    facts = [
        ("adapter", os.path.relpath(folder.adapter)),
        ("use it", f'python -m finetune.generate {run} --prompt "…"'),
    ]
    for location in tracker.locations():
        facts.append(("look at it", location))
    return facts
