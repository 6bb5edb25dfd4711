"""Every place that shows the accuracy says what it is a share of, and no other metric's does."""

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from rich.console import Console
from support.studies import made_study, text_of, trial

from finetune.engine.output import RunOutput
from finetune.files.run_folder import RunFolder
from finetune.metrics.names import OF_TOKENS, describe_metric, metric_notes
from finetune.tracking.tracker import Tracker
from sweeps.answer import charts
from sweeps.answer.advice import analyze
from sweeps.answer.descriptions import confirmation_lines, final_comparison_lines
from sweeps.answer.learning_curves import curves_of, learning_curves
from sweeps.answer.report import write_report
from sweeps.answer.summary import summary_lines
from sweeps.study.formatting import trials_table
from sweeps.study.live_table import LiveTable
from sweeps.study.outcome import Outcome


def test_the_name_of_the_accuracy_is_explained_and_no_other() -> None:
    for name in ("accuracy", "eval/accuracy", "test/accuracy", "eval/a/accuracy"):
        assert describe_metric(name) == f"{name} ({OF_TOKENS})"
    for name in ("eval/loss", "eval/label_accuracy", "eval/balanced_accuracy"):
        assert describe_metric(name) == name
    names = ["eval/loss", "eval/accuracy", "eval/label_accuracy"]
    assert metric_notes(names) == [f"eval/accuracy: {OF_TOKENS}"]


ANSWER = {
    "trial": 1, "baseline": 1, "run": "trials/1",
    "test": {"rows": 9, "objective": {"metric": "test/accuracy", "winner": 0.5}, "winner": 1.0},
}  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "rows"),
    [
        ("test/exact_match", "on 4 test rows that"),
        ("test/harness/arc_easy", "on 4 documents of the benchmark that"),
    ],
)
def test_the_rows_of_the_metric_are_counted(metric: str, rows: str) -> None:
    """`evaluation.limit` and a benchmark's documents are other rows than those of the loss."""
    objective = {"metric": metric, "winner": 0.5, "rows": 4}
    answer = ANSWER | {"test": {"rows": 9, "winner": 1.0, "objective": objective}}
    assert rows in final_comparison_lines(answer)[0]


CONFIRMATION = {
    "objective": "eval/accuracy", "winner": 1, "before": 1, "comparisons": [],
    "candidates": [
        {"trial": 1, "mean": 0.5, "spread": None, "values": [0.5], "role": "", "failed": []}
    ],
}  # fmt: skip
COMPARISON = {
    "metric": "test/accuracy", "trial": 1, "other": 2, "difference": 0.1, "low": None,
    "verdict": "too few rows to say",
}  # fmt: skip


def drawn(study: Any) -> str:
    console = Console(width=300)
    with console.capture() as capture:
        console.print(LiveTable(study).draw())
    return capture.get()


def axis_of(figure: Any) -> str:
    """A chart with its titles, as JSON."""
    assert figure is not None
    text: str = figure.to_json()
    return text


PLACES: dict[str, Callable[[Any], str]] = {
    "sweeps show": trials_table,
    "the table of a session": drawn,
    "the summary": lambda study: "\n".join(
        summary_lines(study, {**ANSWER, "test": None}, analyze(study), None)
    ),
    "the log line of a trial": lambda study: Outcome(
        TrialState.COMPLETE, [0.5]
    ).describe(study.objectives),
    "the test rows": lambda _: "\n".join(final_comparison_lines(ANSWER)),
    "a confirmation": lambda _: "\n".join(confirmation_lines(CONFIRMATION)),
    "its comparison": lambda _: "\n".join(
        confirmation_lines(
            {**CONFIRMATION, "candidates": [], "comparisons": [COMPARISON]}
        )
    ),
    "the chart of a confirmation": lambda _: axis_of(charts.seeds(CONFIRMATION)),
    "history": lambda study: axis_of(charts.history(study)),
    "slices": lambda study: axis_of(charts.slices(study, None)),
    "learning curves": lambda study: axis_of(
        learning_curves(study, curves_of(study, {}), None)
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_each_place_of_a_study_explains_it(tmp_path: Path, place: str) -> None:
    draw = random.Random(0)
    study = made_study(
        tmp_path / "s",
        [trial(draw) for _ in range(24)],
        "eval/accuracy",
        direction="maximize",
    )

    assert OF_TOKENS in PLACES[place](study)


def test_the_report_explains_it_in_each_section(tmp_path: Path) -> None:
    draw = random.Random(0)
    study = made_study(
        tmp_path / "s",
        [trial(draw) for _ in range(24)],
        "eval/accuracy",
        direction="maximize",
    )

    page = text_of(write_report(study))

    header = page.partition("<header>")[2].partition("</header>")[0]
    assert header.count(OF_TOKENS) == 2
    for name in ("answer", "leaderboard", "curves", "history", "parallel", "slices"):
        section = page.partition(f'<section id="{name}">')[2].partition("</section>")[0]
        assert OF_TOKENS in section, name


def test_the_terminal_of_a_run_explains_that_of_a_source(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = RunOutput(RunFolder(tmp_path), Tracker(), 9, interactive=False)
    metrics = {"eval/loss": 1.0, "eval/accuracy": 0.8, "eval/a/accuracy": 0.7}

    with caplog.at_level(logging.INFO):
        output.show_evaluation(3, metrics)

    assert f"a/accuracy ({OF_TOKENS}) 0.7000" in caplog.text
