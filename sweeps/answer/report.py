"""The report of a study: one HTML file that needs no network.

python -m sweeps report STUDY [--watch]
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from optuna.trial import TrialState
from plotly.offline import get_plotlyjs

from finetune.files.atomic import write_text
from finetune.files.lock import file_lock
from finetune.metrics.names import describe_metric
from sweeps.answer.advice import Analysis
from sweeps.answer.descriptions import final_comparison_lines
from sweeps.answer.report_data import ReportData
from sweeps.answer.report_sections import sections
from sweeps.space.feasibility import why_no_winner
from sweeps.study.formatting import format_counts
from sweeps.study.in_memory import snapshot
from sweeps.study.study import Study

REPORT = "report.html"


REFRESH = 20
"""Seconds after which the page of a running study reloads itself."""


def write_report(
    study: Study, live: bool = False, analysis: Analysis | None = None
) -> Path:
    """Write `report.html` into the study's folder, atomically.

    Args:
        study: the study.
        live: whether the page reloads itself until all trials are done and the answer is written.
        analysis: the analysis of the study's trials; None: it is computed.

    Returns:
        The path of the report.
    """
    path = study.folder / REPORT
    # The lock makes the report that was begun last, which has the newest data, the one that stays.
    with file_lock(study.folder / ".report.lock"):
        data = ReportData.read(snapshot(study), analysis)
        html = render_page(data, live)
        write_text(path, html, single_writer=True)
    return path


def watch(
    study: Study,
    print_line: Callable[[str], None],
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Write the report every `REFRESH` seconds until no trial runs or waits.

    Args:
        study: the study.
        print_line: called with a line for the terminal after each update.
        pause: waits for a number of seconds between two updates.
    """
    while True:
        path = write_report(study, live=True)
        clock = time.strftime("%H:%M:%S")
        print_line(f"{clock}  {format_counts(study)}: {os.path.relpath(path)}")
        if not study.trials(TrialState.RUNNING, TrialState.WAITING):
            return
        pause(REFRESH)


def render_page(data: ReportData, live: bool = False, version: str = "") -> str:
    """Render the page as HTML.

    Args:
        data: the data of the report.
        live: whether the page of an unfinished study reloads itself.
        version: identifies the page where `sweeps.answer.page_server` serves it. The page then asks
            for newer ones; empty: it is a file.

    Returns:
        The HTML, with plotly inside unless it is served.
    """
    study = data.study
    waiting = len(study.trials(TrialState.WAITING))
    running = len(study.trials(TrialState.RUNNING))
    is_unfinished = bool(waiting or running or data.answer is None)
    loader = PackageLoader("sweeps.answer", "")
    # Escaped, because prompts, errors and config values come from users; a name that the template
    # misspells is an error instead of an empty place.
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    html: str = environment.get_template("report.html.jinja").render(
        study=study.name,
        counts=format_counts(study),
        waiting=waiting,
        running=running,
        refresh=REFRESH if live and is_unfinished else None,
        objectives=list(map(describe_metric, study.objectives)),
        directions=[direction.name.lower() for direction in study.optuna.directions],
        updated=_last_change(data),
        verdict=_verdict(data),
        sections=sections(data),
        version=version,
        plotly="" if version else get_plotlyjs(),
    )
    return html


def _last_change(data: ReportData) -> str:
    """Return when the last trial began or ended, so that the same study gives the same page."""
    times = []
    for trial in data.trials.values():
        changes = (trial.datetime_start, trial.datetime_complete)
        times += [change for change in changes if change is not None]
    return f"{max(times):%Y-%m-%d %H:%M}" if times else "before its first trial"


def _verdict(data: ReportData) -> str:
    """Say in one sentence which trial wins."""
    winner = data.winner
    if winner is None:
        return f"There is no winner: {why_no_winner(data.trials.values())}."
    if data.has_several_objectives:
        count = len(data.pareto_front())
        return (
            f"Trial {winner.number} is the first of {count} trials on the Pareto front."
        )
    objective = f"{describe_metric(data.study.objectives[0])} {winner.value:.4f}"
    result = f"Trial {winner.number} wins with {objective}"
    if data.answer is None or data.test is None:
        return f"{result}."
    return (
        f"{result}. On the test rows: {'; '.join(final_comparison_lines(data.answer))}."
    )
