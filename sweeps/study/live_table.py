"""A table on the terminal of the trials that train now, drawn while a session runs.

Without a terminal there is no table, and the log lines are enough.
"""

import contextlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from finetune.metrics.names import metric_notes
from finetune.quantities import format_duration
from sweeps.study.budget import describe_tokens
from sweeps.study.errors import StorageLost
from sweeps.study.formatting import format_parameters, objective_cells
from sweeps.study.study import Study

REFRESH_SECONDS = 1.0
"""Seconds between two drawings."""

METRICS_TAIL = 4096
"""Bytes read from the end of a trial's metrics: some lines, also where one has many metrics."""


@contextlib.contextmanager
def live_table(study: Study) -> Iterator[None]:
    """Draw the study below the log lines while the context lasts, if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    # Another thread draws it, so it has a storage of its own, which does not wait for a database.
    table = LiveTable(Study.load(study.folder, retry_seconds=0))
    with Live(
        console=Console(stderr=True),
        get_renderable=table.draw,
        refresh_per_second=1 / REFRESH_SECONDS,
        transient=True,
    ):
        yield


class LiveTable:
    """Draws the running trials, and a line on the study.

    Args:
        study: the study.
    """

    def __init__(self, study: Study) -> None:
        self._study = study
        self._began = time.monotonic()
        self._finished_before = len(study.finished())
        self._drawing: RenderableType = Text("")

    def draw(self) -> RenderableType:
        """Draw the study as it is now, or as it was before its database was out of reach."""
        with contextlib.suppress(StorageLost):
            self._drawing = self._draw()
        return self._drawing

    def _draw(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, header_style="bold")
        objectives = self._study.objectives
        columns = ("trial", "parameters", "step", *objectives, "train/loss", "tokens/s")
        for column in columns:
            is_text = column == "parameters"
            table.add_column(column, justify="left" if is_text else "right")
        for trial in self._study.trials(TrialState.RUNNING):
            table.add_row(*self._row(trial))
        notes = metric_notes(objectives)
        return Group(table, *map(Text, notes), Text(self._summary()))

    def _row(self, trial: FrozenTrial) -> list[str]:
        folder = self._study.folder_of(trial.number)
        metrics = last_metrics(folder.path / "metrics.jsonl")
        step = metrics.get("step", 0)
        steps = trial.user_attrs.get("steps", "?")
        loss = metrics.get("train/loss")
        speed = metrics.get("train/tokens_per_second")
        return [
            str(trial.number),
            format_parameters(trial),
            f"{step}/{steps}",
            *objective_cells(trial, len(self._study.objectives)),
            "" if loss is None else f"{loss:.4f}",
            "" if speed is None else f"{speed:.0f}",
        ]

    def _summary(self) -> str:
        """Return the numbers of trials, the best one, and the time left, in one line."""
        finished = self._study.finished()
        states = Counter(trial.state for trial in finished)
        pruned = states[TrialState.PRUNED]
        failed = states[TrialState.FAIL]
        total = self._study.total
        of_total = "" if total is None else f" of {total}"
        line = f"{len(finished)}{of_total} done ({pruned} pruned, {failed} failed)"
        best = next(iter(self._study.ranked()), None)
        if best is not None:
            cells = objective_cells(best, len(best.values))
            line += f" · best {' '.join(cells)} (trial {best.number})"
        tokens = describe_tokens(self._study)
        if tokens:
            line += f" · {tokens}"
        return line + self._time_left(len(finished))

    def _time_left(self, finished: int) -> str:
        """Estimate the time until the study has its number of trials; empty where unknown."""
        # A budget may end the study before.
        total = self._study.total
        if total is None or self._study.max_tokens is not None:
            return ""
        # The time since this session began belongs to the trials that have finished in it.
        finished_here = finished - self._finished_before
        unfinished = total - finished
        if not finished_here or unfinished <= 0:
            return ""
        seconds_per_trial = (time.monotonic() - self._began) / finished_here
        left = format_duration(seconds_per_trial * unfinished)
        return f" · about {left} left"


def last_metrics(path: Path) -> dict[str, Any]:
    """Return the last value of each metric in the last lines of a run's `metrics.jsonl`."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            # Only the end: the file grows with the run, and is read at each drawing.
            file.seek(max(0, size - METRICS_TAIL))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return {}
    metrics: dict[str, Any] = {}
    for line in lines:
        # The first line may be cut off, and the last one is perhaps being written.
        with contextlib.suppress(json.JSONDecodeError):
            metrics |= json.loads(line)
    return metrics
