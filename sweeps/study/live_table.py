"""A study on the terminal while it runs: a live table of what trains now. Elsewhere the workers' lines are enough."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sweeps.study.errors import StorageLost
from sweeps.study.formatting import objective_cells, parameters
from sweeps.study.study import Study

REFRESH = 1.0
"""Seconds between two looks at the study."""


@contextlib.contextmanager
def live_table(study: Study, total: int) -> Iterator[None]:
    """Show the study below the lines that are printed, as long as the context lasts, if there is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    # A storage of its own: it is drawn by another thread, which waits for no database.
    view = _View(Study.load(study.folder, patience=0), total)
    with Live(console=Console(stderr=True), get_renderable=view.draw, refresh_per_second=1 / REFRESH, transient=True):
        yield


class _View:
    """What the table shows at a moment."""

    def __init__(self, study: Study, total: int) -> None:
        self._study, self._total = study, total
        self._began, self._done_before = time.monotonic(), len(study.finished())
        self._last: RenderableType = Text("")

    def draw(self) -> RenderableType:
        """The running trials, and a line on the study as a whole; the last ones while its database is out of reach."""
        with contextlib.suppress(StorageLost):
            self._last = self._draw()
        return self._last

    def _draw(self) -> RenderableType:
        running = self._study.trials(TrialState.RUNNING)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("trial", "parameters", "step", *self._study.objectives, "train/loss", "tokens/s"):
            table.add_column(column, justify="left" if column == "parameters" else "right")
        for trial in running:
            table.add_row(*self._row(trial))
        return Group(table, Text(self._line()))

    def _row(self, trial: FrozenTrial) -> list[str]:
        seen = last_metrics(self._study.folder_of(trial.number).path / "metrics.jsonl")
        loss, speed = seen.get("train/loss"), seen.get("train/tokens_per_second")
        return [
            str(trial.number),
            parameters(trial),
            f"{seen.get('step', 0)}/{trial.user_attrs.get('steps', '?')}",
            *objective_cells(trial, len(self._study.objectives)),
            "" if loss is None else f"{loss:.4f}",
            "" if speed is None else f"{speed:.0f}",
        ]

    def _line(self) -> str:
        finished = self._study.finished()
        pruned, failed = (
            sum(trial.state == state for trial in finished) for state in (TrialState.PRUNED, TrialState.FAIL)
        )
        line = f"{len(finished)} of {self._total} done ({pruned} pruned, {failed} failed)"
        best = next(iter(self._study.ranked()), None)
        if best is not None:
            line += f" · best {' '.join(objective_cells(best, len(best.values)))} (trial {best.number})"
        here = len(finished) - self._done_before
        if here and len(finished) < self._total:
            left = (time.monotonic() - self._began) / here * (self._total - len(finished))
            line += f" · about {max(1, round(left / 60))} min left"
        return line


def last_metrics(path: Path) -> dict[str, Any]:
    """The last value of each metric that a run has logged lately."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return {}
    seen: dict[str, Any] = {}
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # cut off by the window, or being written
            seen |= json.loads(line)
    return seen
