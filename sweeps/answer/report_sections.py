"""The report's sections, in the order of the page."""

from typing import Any

import yaml  # type: ignore[import-untyped]

from finetune.files.atomic import read_json, read_json_list
from finetune.files.run_folder import RunFolder
from finetune.metrics.names import (
    describe_metric,
    metric_notes,
)
from sweeps.answer import advice, charts, importance
from sweeps.answer.commands import commands
from sweeps.answer.descriptions import confirmation_lines
from sweeps.answer.learning_curves import curves_of, learning_curves
from sweeps.answer.parallel_coordinates import parallel_coordinates
from sweeps.answer.report_confusion import confusion_section
from sweeps.answer.report_data import ReportData
from sweeps.answer.report_result import result_section
from sweeps.answer.report_rows import rows_section
from sweeps.answer.report_section import Section, chart_html, chart_section
from sweeps.answer.report_tables import failures, leaderboard, spending
from sweeps.study.formatting import parameter_names
from sweeps.study.warm_start import warm_start_notes

COMPARED = (
    "Trials are compared at the last evaluation that all of them have reached, "
    "pruned ones too."
)


ENVIRONMENT_KEYS = (
    "engine",
    "slots",
    "learning_rate",
    "effective_batch_size",
    "peak_memory_bytes",
    "git_commit",
    "base_model",
    "dataset_fingerprint",
    "rows",
    "versions",
)
"""Entries of `result.json` that describe how a trial was run."""


def sections(data: ReportData) -> list[Section]:
    """Build all sections that have content."""
    study = data.study
    winner = data.winner.number if data.winner else None
    every_section = [
        result_section(data),
        confusion_section(data),
        _advice(data),
        _confirmation(data),
        leaderboard(data),
        _warm_start(data),
        _pareto(data),
        _curves(data),
        chart_section("history", "Optimisation history", charts.history(study)),
        chart_section(
            "parallel",
            "Parallel coordinates",
            parallel_coordinates(study, winner),
            ". ".join([*metric_notes(study.objectives[:1]), COMPARED]),
            _width_for_parameters(data),
        ),
        _importance(data),
        chart_section(
            "slices",
            "Slices",
            charts.slices(study, winner),
            COMPARED,
            _width_for_parameters(data),
        ),
        spending(data),
        failures(data),
        _samples(data),
        _rows(data),
        _commands(data),
        _config(data),
    ]
    return [section for section in every_section if section.has_content]


def _width_for_parameters(data: ReportData) -> int:
    """Return the pixels that a chart with an axis for each parameter needs."""
    names = parameter_names(data.trials.values())
    return max(720, 130 * len(names))


def _advice(data: ReportData) -> Section:
    measured = importance.comparable_trials(data.study.optuna)
    has_too_few = 0 < len(measured) < advice.MIN_TRIALS
    note = "Too few trials for advice." if has_too_few else ""
    return Section(
        "next",
        "Advice",
        note,
        lines=data.analysis.advice,
    )


def _confirmation(data: ReportData) -> Section:
    if data.confirmation is None:
        return Section("confirmed", "Confirmation")
    return Section(
        "confirmed",
        "Confirmation",
        "The best trials and the baseline were retrained with other seeds. "
        "The winner is chosen on held-out rows and compared on test rows.",
        lines=confirmation_lines(data.confirmation),
        chart=chart_html("seeds", charts.seeds(data.confirmation)),
    )


def _warm_start(data: ReportData) -> Section:
    notes = warm_start_notes(data.study)
    note = "Results of earlier studies inform the sampler; they are no trials of this study."
    return Section(
        "warm-start",
        "Earlier studies",
        note if notes else "",
        lines=notes,
    )


def _pareto(data: ReportData) -> Section:
    figure = charts.pareto_front(data.study) if data.has_several_objectives else None
    return chart_section("pareto", "Pareto front", figure)


def _curves(data: ReportData) -> Section:
    note = ""
    if not any(data.metrics.values()):
        note = "From the values that trials reported; their folders are not on this machine."
    curves = curves_of(data.study, data.metrics)
    winner = data.winner.number if data.winner else None
    figure = learning_curves(data.study, curves, winner)
    return chart_section("curves", "Learning curves", figure, note)


def _importance(data: ReportData) -> Section:
    title = "Parameter importance"
    if data.has_several_objectives:
        title = f"{title} for {describe_metric(data.study.objectives[0])}"
    shares = data.analysis.importance
    if not shares.trials:
        return Section("importance", title)
    note = ""
    if shares.trials >= importance.MIN_TRIALS:
        note = (
            "Share of the differences between trials that a model explains by this parameter "
            "alone, of trials that it has not seen. Shares need not add up to 100 %: interactions "
            "belong to several parameters, and noise to none."
        )
    return Section(
        "importance",
        title,
        note,
        lines=[importance.describe_importance(shares)],
        chart=chart_html("importance", charts.importance_bars(shares)),
    )


def _samples(data: ReportData) -> Section:
    """Show what the base and the winner generate from the sample prompts, and the rows' answers."""
    rows: list[Any] = []
    if data.answer is not None:
        rows = read_json_list(RunFolder(data.study.folder / "best").samples)
    samples = []
    for row in rows:
        texts = {key: str(row.get(key, "")) for key in ("prompt", "before", "after")}
        # Prompts of the config have no expected answer.
        if "expected" in row:
            texts["expected"] = str(row["expected"])
        samples.append(texts)
    return Section("samples", "Samples before and after training", samples=samples)


def _rows(data: ReportData) -> Section:
    """Describe the winner's rows, and show the first ones."""
    if data.winner is None:
        return Section("rows", "Rows")
    number = data.winner.number
    return rows_section(data.study.folder_of(number), data.results[number])


def _commands(data: ReportData) -> Section:
    if data.answer is None:
        return Section("use", "Use the winner")
    return Section(
        "use",
        "Use the winner",
        "Run these commands in the folder in which this report was written. "
        "Merge before you serve; replace YOU by your name on the hub.",
        commands=commands(data.study),
    )


def _config(data: ReportData) -> Section:
    """Show the resolved config and the environment of the winner, or else of the first trial."""
    title = "Config and environment"
    first_trial = next(iter(data.trials.values()), None)
    trial = data.winner or first_trial
    if trial is None:
        return Section("config", title)
    folder = data.study.folder_of(trial.number)
    identity = read_json(folder.identity) or {}
    result = data.results[trial.number]
    environment = {key: result.get(key) for key in ENVIRONMENT_KEYS}
    # The command of `notify` is for this machine; a report is mailed.
    config = {**identity.get("config", {})}
    config.pop("notify", None)
    folded = [
        (f"config of trial {trial.number}", _yaml(config)),
        ("environment", _yaml(environment)),
    ]
    return Section("config", title, folded=folded)


def _yaml(values: dict[str, Any]) -> str:
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text
