"""The report of a study: one HTML file that needs no network, to decide by.

python -m sweeps report STUDY [--watch]
"""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml  # type: ignore[import-untyped]
from optuna.trial import FrozenTrial, TrialState

from finetune.files.atomic import read_json, write_text
from finetune.files.lock import file_lock
from finetune.files.run_folder import RunFolder
from sweeps.answer import charts
from sweeps.answer.advice import LEAST as ENOUGH
from sweeps.answer.advice import Insight, insight
from sweeps.answer.confirm import confirmation
from sweeps.answer.importance import LEAST, comparable_trials
from sweeps.study.formatting import (
    commands,
    confirmation_lines,
    counts,
    format_value,
    objective_cells,
    short_name,
    test_lines,
    trial_note,
)
from sweeps.study.study import OUT_OF_TIME, Study, role

if TYPE_CHECKING:
    import plotly.graph_objects as go


ANSWER = "answer.json"
"""What a study's end has found: the winner, the baseline, and both on the test rows."""


REPORT = "report.html"


COMPARED = "Trials are compared at the last evaluation that all of them have reached, pruned ones too."


REFRESH = 20
"""Seconds after which the page of a study that runs loads itself anew."""


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    cells: Sequence[str]
    kind: str = ""
    """winner, baseline, or nothing special"""


@dataclass(frozen=True)
class Section:
    """A part of the page; what it does not have stays empty."""

    id: str
    title: str
    note: str = ""
    figures: Sequence[tuple[str, str]] = ()
    """Large numbers, each with what it is."""
    lines: Sequence[str] = ()
    chart: str = ""
    head: Sequence[str] = ()
    rows: Sequence[Row] = ()
    sortable: bool = False
    samples: Sequence[Mapping[str, str]] = ()
    folded: Sequence[tuple[str, str]] = ()
    """Long texts, each under its name."""

    @property
    def has_content(self) -> bool:
        """Whether there is anything to show under the title."""
        return bool(self.note or self.figures or self.lines or self.chart or self.rows or self.samples or self.folded)


def write_report(study: Study, live: bool = False, known: Insight | None = None) -> Path:
    """Write `report.html` into the study's folder, whole or not at all; returns its path.

    `known` is what was found of the study already; None: it is found anew.
    A live page loads itself anew, as another shall follow: until all trials are done and the answer is there.
    Of two that write it at once, the one that began later has the last word.
    """
    path = study.folder / REPORT
    with file_lock(study.folder / ".report.lock"):
        write_text(path, _Report(study.snapshot(), known).html(live), single_writer=True)
    return path


def watch(study: Study, say: Callable[[str], None]) -> None:
    """Write the report again and again, until no trial runs or waits."""
    while True:
        say(f"{time.strftime('%H:%M:%S')}  {counts(study)}: {os.path.relpath(write_report(study, live=True))}")
        if not study.trials(TrialState.RUNNING, TrialState.WAITING):
            return
        time.sleep(REFRESH)


class _Report:
    """What the page shows, read once from the study and its folders."""

    def __init__(self, study: Study, known: Insight | None) -> None:
        self.study, self.insight = study, known or insight(study)
        self.answer: dict[str, Any] | None = read_json(study.folder / ANSWER) if study.ranked() else None
        begun = [trial for trial in study.trials() if trial.state != TrialState.WAITING]
        self.trials = {trial.number: trial for trial in begun}
        folders = {number: study.folder_of(number) for number in self.trials}
        self.results: dict[int, dict[str, Any]] = {n: read_json(folder.result) or {} for n, folder in folders.items()}
        self.logged = {number: folder.metrics() for number, folder in folders.items()}
        self.confirmed = confirmation(study)

    @cached_property
    def winner(self) -> FrozenTrial | None:
        """The answer's trial; while the study runs, the best so far."""
        ranked = self.study.ranked()
        if self.confirmed:
            return self.trials[self.confirmed["winner"]]
        return ranked[0] if ranked else None

    @cached_property
    def tested(self) -> dict[str, Any] | None:
        """The answer, where it is of the winner as it stands."""
        fits = self.answer is not None and self.winner is not None and self.answer["trial"] == self.winner.number
        return self.answer if fits else None

    def html(self, live: bool = False) -> str:
        """The whole page."""
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from plotly.offline import get_plotlyjs

        study = self.study
        page = Environment(loader=PackageLoader("sweeps.answer", ""), autoescape=True, undefined=StrictUndefined)
        waiting, running = (len(study.trials(state)) for state in (TrialState.WAITING, TrialState.RUNNING))
        text: str = page.get_template("report.html.jinja").render(
            study=study.name,
            counts=counts(study),
            waiting=waiting,
            running=running,
            refresh=REFRESH if live and (waiting or running or self.tested is None) else None,
            objectives=study.objectives,
            directions=[direction.name.lower() for direction in study.optuna.directions],
            last=self._last(),
            verdict=self._verdict(),
            parts=[part for part in self._sections() if part.has_content],
            plotly=get_plotlyjs(),
        )
        return text

    def _last(self) -> str:
        """When the last trial began or ended: the same study gives the same page, whenever it is written."""
        trials = self.trials.values()
        times = [time for trial in trials for time in (trial.datetime_start, trial.datetime_complete) if time]
        return f"{max(times):%Y-%m-%d %H:%M}" if times else "before its first trial"

    def _verdict(self) -> str:
        if self.winner is None:
            return "No trial is complete yet, so there is no answer."
        if len(self.study.objectives) > 1:
            front = len(self.study.optuna.best_trials)
            return f"Trial {self.winner.number} is the first of {front} that no other beats in all objectives at once."
        said = f"Trial {self.winner.number} wins with {self.study.objectives[0]} {self.winner.value:.4f}"
        if self.tested is None or self.tested["test"] is None:
            return f"{said}."
        return f"{said}; test loss {'; difference '.join(test_lines(self.tested))}."

    def _sections(self) -> list[Section]:
        study = self.study
        curves = charts.curves_of(study, self.logged)
        winner = self.winner.number if self.winner else None
        several = len(study.objectives) > 1
        return [
            self._answer(),
            self._next(),
            self._confirmed(),
            self._leaderboard(),
            _charted("pareto", "Pareto front", charts.pareto_front(study) if several else None),
            _charted("curves", "Learning curves", charts.learning_curves(study, curves, winner), self._curves_note()),
            _charted("history", "Optimisation history", charts.history(study)),
            _charted("parallel", "Parallel coordinates", charts.parallel_coordinates(study), COMPARED),
            self._importance(),
            _charted("slices", "Slices", charts.slices(study), COMPARED),
            self._spent(),
            self._failures(),
            Section("samples", "Before and after", samples=self._samples()),
            self._use(),
            self._made_of(),
        ]

    def _importance(self) -> Section:
        shares = self.insight.shares
        title = "What mattered"
        if len(self.study.objectives) > 1:
            title = f"{title} for {self.study.objectives[0]}"
        if not shares:
            few = f"Needs {LEAST} trials that were measured and differ."
            return Section("importance", title, few if self.trials else "")
        trial_note = (
            f"By fANOVA on resamples of the trials; nine of ten resamples lie within the bars' lines. {COMPARED}"
        )
        return _charted("importance", title, charts.importance_bars(shares), trial_note)

    def _answer(self) -> Section:
        """The winner beside the baseline."""
        winner, baseline = self.winner, self.study.baseline()
        if winner is None:
            return Section("answer", "The answer", "No trial is complete yet.")
        sides = [("winner", winner)] + ([("baseline", baseline)] if baseline and baseline != winner else [])
        names = list(dict.fromkeys(name for _, trial in sides for name in trial.params))
        rows = [Row([name, *(format_value(trial.params.get(name, "")) for _, trial in sides)]) for name in names]
        for index, name in enumerate(self.study.objectives):
            rows.append(Row([name, *(f"{trial.values[index]:.4f}" for _, trial in sides)], "winner"))
        test = self.tested["test"] if self.tested else None
        if test is not None:
            rows.append(Row(["test/loss", *(f"{test[side]:.4f}" if side in test else "" for side, _ in sides)]))
        named = zip(("test loss", "difference"), test_lines(self.tested) if self.tested else [], strict=False)
        lines = [f"{name} {line}" for name, line in named]
        lines = [*lines, "The winner is the baseline itself."] if baseline == winner else lines
        head = ["", *(f"{side} (trial {trial.number})" for side, trial in sides)]
        return Section("answer", "The answer", lines=lines, head=head, rows=rows)

    def _next(self) -> Section:
        few = 0 < len(comparable_trials(self.study.optuna)) < ENOUGH
        return Section("next", "Next", "Too few trials for advice." if few else "", lines=self.insight.advice)

    def _confirmed(self) -> Section:
        if not self.confirmed:
            return Section("confirmed", "Confirmation")
        text = "The best trials and the baseline, trained anew with other seeds. Held-out rows choose, test rows prove."
        lines = confirmation_lines(self.confirmed)
        chart = _drawn("seeds", charts.seeds(self.confirmed))
        return Section("confirmed", "Confirmation", text, lines=lines, chart=chart)

    def _leaderboard(self) -> Section:
        study = self.study
        names = sorted({name for trial in self.trials.values() for name in trial.params})
        ranked = [trial.number for trial in study.ranked()]
        order = [*ranked, *(number for number in self.trials if number not in set(ranked))]
        front = {trial.number for trial in study.optuna.best_trials} if len(study.objectives) > 1 else set()
        rows = []
        for number in order:
            trial, result = self.trials[number], self.results[number]
            kind = "winner" if trial == self.winner else "baseline" if role(trial) == "baseline" else ""
            cells = [
                str(number),
                trial.state.name.lower(),
                *objective_cells(trial, len(study.objectives)),
                *(format_value(trial.params.get(name, "")) for name in names),
                str(result.get("step", "")),
                _number(result.get("tokens_per_second"), ".0f"),
                "on the Pareto front" if number in front else trial_note(trial),
            ]
            rows.append(Row(cells, kind))
        head = ["trial", "state", *study.objectives, *map(short_name, names), "step", "tokens/s", "note"]
        return Section("leaderboard", "Leaderboard", head=head, rows=rows, sortable=True)

    def _curves_note(self) -> str:
        return "" if any(self.logged.values()) else "From what the trials have reported: their folders are not here."

    def _spent(self) -> Section:
        """Time and tokens, and what pruning has saved of them."""
        tokens = {number: result.get("train_tokens") or 0 for number, result in self.results.items()}
        seconds = {number: result.get("train_seconds") or 0.0 for number, result in self.results.items()}
        saved = dict.fromkeys(("tokens", "seconds"), 0.0)
        for trial in self.study.trials(TrialState.PRUNED):
            if trial.user_attrs.get("reason") == OUT_OF_TIME:
                continue
            step, steps = trial.user_attrs.get("step"), trial.user_attrs.get("steps")
            if step and steps:
                saved["tokens"] += tokens[trial.number] * (steps / step - 1)
                saved["seconds"] += seconds[trial.number] * (steps / step - 1)
        spent = sum(tokens.values())
        figures = [
            (f"{spent:,}", "tokens trained"),
            (_duration(sum(seconds.values())), "of training"),
            (_duration(self._wall_time()), "from the first trial's start to the last one's end"),
            (f"{saved['tokens']:,.0f}", "tokens saved by pruning"),
            (_duration(saved["seconds"]), "of training saved"),
            (f"{saved['tokens'] / (spent + saved['tokens']):.0%}" if spent else "", "of all tokens saved"),
        ]
        again = sum(
            (read_json(path) or {}).get("train_tokens") or 0 for path in self.study.folder.glob("confirm/*/result.json")
        )
        figures += [(f"{again:,}", "tokens trained by the confirmation, besides")] if again else []
        chart = _drawn("tokens", charts.spending(self.study, tokens))
        return Section("spent", "Time and tokens", figures=figures if spent else (), chart=chart)

    def _wall_time(self) -> float:
        starts = [trial.datetime_start for trial in self.trials.values() if trial.datetime_start]
        ends = [trial.datetime_complete for trial in self.trials.values() if trial.datetime_complete]
        return (max(ends) - min(starts)).total_seconds() if starts and ends else 0.0

    def _failures(self) -> Section:
        rows = [
            Row([str(trial.number), str(trial.user_attrs.get("error")), os.path.relpath(self._folder(trial))])
            for trial in self.study.trials(TrialState.FAIL)
        ]
        return Section("failures", "Failures", head=["trial", "reason", "folder"] if rows else (), rows=rows)

    def _folder(self, trial: FrozenTrial) -> Path:
        return self.study.folder_of(trial.number).path

    def _samples(self) -> list[dict[str, str]]:
        rows = read_json(RunFolder(self.study.folder / "best").samples) if self.tested else None
        return [{name: str(row.get(name, "")) for name in ("prompt", "before", "after")} for row in rows or []]

    def _use(self) -> Section:
        if self.tested is None:
            return Section("use", "Use it")
        text = "From the folder in which this report was made. merge before serve; hub names are yours to choose."
        rows = [Row([name, command]) for name, command in commands(self.study)]
        return Section("use", "Use it", text, head=["to", "command"], rows=rows)

    def _made_of(self) -> Section:
        """The resolved config and the environment."""
        shown_trial = self.winner or next(iter(self.trials.values()), None)
        if shown_trial is None:
            return Section("config", "Config and environment")
        result = self.results[shown_trial.number]
        identity = read_json(self.study.folder_of(shown_trial.number).identity) or {}
        keys = ("engine", "slots", "learning_rate", "effective_batch_size", "peak_memory_bytes", "git_commit",
                "base_model", "dataset_fingerprint", "rows", "versions")  # fmt: skip
        texts = {
            f"config of trial {shown_trial.number}": identity.get("config", {}),
            "environment": {key: result.get(key) for key in keys},
        }
        folded = [(name, yaml.safe_dump(value, sort_keys=False, allow_unicode=True)) for name, value in texts.items()]
        return Section("config", "Config and environment", folded=folded)


def _charted(name: str, title: str, figure: "go.Figure | None", text: str = "") -> Section:
    """A section that is a chart; none where there is no chart to be had and nothing to say."""
    return Section(name, title, text, chart=_drawn(name, figure)) if figure is not None else Section(name, title)


def _drawn(name: str, figure: "go.Figure | None") -> str:
    """A chart as HTML, drawn by the page's own plotly."""
    if figure is None:
        return ""
    config = {"displaylogo": False, "responsive": True}
    html: str = figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"chart-{name}", config=config)
    return html


def _number(value: float | None, form: str) -> str:
    return "" if value is None or not math.isfinite(value) else format(value, form)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
