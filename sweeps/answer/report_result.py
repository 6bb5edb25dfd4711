"""The report's first section: the winner next to the baseline."""

from optuna.trial import FrozenTrial

from finetune.metrics.names import describe_metric, format_metric
from sweeps.answer.descriptions import final_comparison_lines
from sweeps.answer.report_data import ReportData
from sweeps.answer.report_section import Row, Section
from sweeps.space.feasibility import why_no_winner
from sweeps.study.formatting import parameter_cells
from sweeps.study.inside import first_inside, is_inside, point_of, values_outside


def result_section(data: ReportData) -> Section:
    """Show the winner next to the baseline."""
    winner = data.winner
    baseline = data.study.baseline()
    if winner is None:
        reason = why_no_winner(data.trials.values())
        return Section("answer", "Result", f"There is no winner: {reason}.")
    sides = {"winner": winner}
    inside = first_inside(data.study.ranked())
    if not is_inside(winner) and inside is not None:
        sides["best inside the space"] = inside
    if baseline is not None and baseline != winner:
        sides["baseline"] = baseline
    head = [""]
    for side, trial in sides.items():
        head.append(f"{side} (trial {trial.number})")
    rows = _parameter_rows(sides) + _objective_rows(data, sides)
    if data.test is not None:
        losses = []
        for side in sides:
            loss = data.test.get(side)
            losses.append("" if loss is None else f"{loss:.4f}")
        rows.append(Row(["test/loss", *losses]))
        compared = data.test.get("objective")
        if compared is not None:
            values = [
                f"{compared[side]:.4f}" if side in compared else "" for side in sides
            ]
            rows.append(Row([describe_metric(compared["metric"]), *values]))
    lines = []
    if data.answer is not None:
        lines += final_comparison_lines(data.answer)
    if baseline == winner:
        lines.append("The winner is the baseline itself.")
    if not is_inside(winner):
        names = ", ".join(values_outside(winner))
        lines.append(f"The winner lies outside the search space: {names}.")
    return Section(
        "answer",
        "Result",
        lines=lines,
        head=head,
        rows=rows,
    )


def _parameter_rows(sides: dict[str, FrozenTrial]) -> list[Row]:
    # A dict in place of a set, to keep the order of the winner's parameters.
    names: dict[str, None] = {}
    for trial in sides.values():
        names |= dict.fromkeys(point_of(trial))
    rows = []
    for name in names:
        cells = [name]
        for trial in sides.values():
            cells += parameter_cells(trial, [name])
        rows.append(Row(cells))
    return rows


def _objective_rows(data: ReportData, sides: dict[str, FrozenTrial]) -> list[Row]:
    rows = []
    for index, name in enumerate(data.study.objectives):
        values = [format_metric(trial.values[index]) for trial in sides.values()]
        rows.append(Row([describe_metric(name), *values], "winner"))
    return rows
