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


def summarize(folder: RunFolder, result: Result, numbers: dict[str, Any], tracker: Tracker) -> None:
    """The end of the run on the terminal: what was learnt, what it took, where it is, how to use it."""
    metrics, rows = result.metrics, result.rows
    assert rows is not None
    facts = []
    if result.progress and result.progress.rungs:
        before, after = result.progress.rungs[0]["metrics"]["eval/loss"], metrics["eval/loss"]
        change = f"{before:.3f} -> {after:.3f} ({after / before - 1:+.1%})"
        facts.append(("held-out loss", f"{change} on {len(rows.evaluation)} rows"))
    if "test/loss" in metrics:
        facts.append(("test loss", f"{metrics['test/loss']:.3f} on {len(rows.test)} rows that no choice has seen"))
    if numbers["tokens_per_second"]:
        work = f"{numbers['train_tokens']} tokens in {numbers['train_seconds']:.0f} s"
        facts.append(("speed", f"{numbers['tokens_per_second']:.0f} tokens/s: {work}"))
        facts.append(("peak memory", f"{numbers['peak_memory_bytes'] / 2**30:.1f} GiB"))
    for sample in read_json(folder.samples) or []:
        facts.append(("prompt", sample["prompt"]))
        facts += [(f"  {when}", " ".join(sample.get(when, "").split())) for when in ("before", "after")]
    facts.append(("adapter", os.path.relpath(folder.adapter)))
    place = shlex.quote(os.path.relpath(folder.path))
    facts.append(("use it", f'python -m finetune.generate {place} --prompt "…"'))
    facts += [("look at it", line) for line in tracker.locations()]
    lines = [f"{result.status}: {result.config.name}", *(f"  {name:14} {text}" for name, text in facts)]
    log.info("%s", "\n".join(lines))
