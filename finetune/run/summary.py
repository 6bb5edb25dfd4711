"""The summary that a run prints at its end."""

import logging
import os
import shlex
from typing import Any

from finetune.files.atomic import read_json
from finetune.files.run_folder import RunFolder
from finetune.run.result import Result
from finetune.tracking.tracker import Tracker

log = logging.getLogger(__name__)

Fact = tuple[str, str]
"""A name and what is said under it."""


def print_summary(
    folder: RunFolder, result: Result, recorded: dict[str, Any], tracker: Tracker
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
        *_cost(recorded),
        *_answers(folder),
        *_next_steps(folder),
        *(("look at it", line) for line in tracker.locations()),
    ]
    lines = [f"{result.status}: {result.config.name}"]
    lines += [f"  {name:14} {text}" for name, text in facts]
    log.info("%s", "\n".join(lines))


def _quality(result: Result, recorded: dict[str, Any]) -> list[Fact]:
    """Losses on held-out rows and test rows, in nats per token."""
    metrics = result.metrics
    counts = recorded["rows"]
    facts: list[Fact] = []
    if result.progress and result.progress.rungs:
        before = result.progress.rungs[0]["metrics"]["eval/loss"]
        after = metrics["eval/loss"]
        change = f"{before:.3f} -> {after:.3f} ({after / before - 1:+.1%})"
        facts.append(("held-out loss", f"{change} on {counts['eval']} rows"))
    if "test/loss" in metrics:
        rows = f"{counts['test']} rows that no decision has used"
        facts.append(("test loss", f"{metrics['test/loss']:.3f} on {rows}"))
    return facts


def _cost(recorded: dict[str, Any]) -> list[Fact]:
    """Speed and memory."""
    speed = recorded["tokens_per_second"]
    if not speed:
        return []
    work = f"{recorded['train_tokens']} tokens in {recorded['train_seconds']:.0f} s"
    memory = recorded["peak_memory_bytes"] / 2**30
    return [("speed", f"{speed:.0f} tokens/s: {work}"), ("peak memory", f"{memory:.1f} GiB")]


def _answers(folder: RunFolder) -> list[Fact]:
    """The sample prompts with their answers before and after training."""
    facts: list[Fact] = []
    for sample in read_json(folder.samples) or []:
        facts.append(("prompt", sample["prompt"]))
        for when in ("before", "after"):
            answer = " ".join(sample.get(when, "").split())
            facts.append((f"  {when}", answer))
    return facts


def _next_steps(folder: RunFolder) -> list[Fact]:
    """Where the adapter is, and the command that uses it."""
    run = shlex.quote(os.path.relpath(folder.path))
    return [
        ("adapter", os.path.relpath(folder.adapter)),
        ("use it", f'python -m finetune.generate {run} --prompt "…"'),
    ]
