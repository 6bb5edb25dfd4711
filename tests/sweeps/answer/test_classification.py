"""A study on a file of two columns, whose objective is the share of right labels."""

import csv
import json
from pathlib import Path

import pytest
from support.commands import Station
from support.configs import study_overrides
from support.runs import final

from sweeps.study.study import Study

LABELS = ("no", "none", "yes")


@pytest.fixture(scope="module")
def study(
    station: Station, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a study that maximises the label accuracy."""
    place = tmp_path_factory.mktemp("labels")
    with (place / "x.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(180):
            writer.writerow([f"Row {number}: {number % 3}", LABELS[number % 3]])
    ended = station.run(
        *study_overrides(tiny_base, "s"), "dataset.path=x.csv", "dataset.limit=null",
        "dataset.eval_fraction=20e-2", "dataset.test_fraction=20e-2",
        "evaluation=classification", "objective=eval/label_accuracy", "trainer.max_steps=8",
        "optimizer.learning_rate=1e-2", "~search", "lora.r=choice(1,16)",
        "hydra.sweeper.n_trials=3", "hydra.sweeper.slots=3", cwd=place,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return place / "outputs" / "sweeps" / "s"


def test_the_study_maximises_the_share_of_right_labels(study: Path) -> None:
    loaded = Study.load(study)

    assert loaded.optuna.direction.name == "MAXIMIZE"
    values = [trial.value for trial in loaded.trials() if trial.value is not None]
    assert loaded.ranked()[0].value == max(values)


def test_the_answer_compares_it_with_an_interval_of_rows(study: Path) -> None:
    answer = json.loads((study / "answer.json").read_text())
    winner = study / "trials" / str(answer["trial"])

    compared = answer["test"]["objective"]
    assert compared["metric"] == "test/label_accuracy"
    expected = final(winner)["metrics"]["test/label_accuracy"]
    assert compared["winner"] == expected


def test_the_report_has_the_confusion_of_the_winner(study: Path) -> None:
    page = (study / "report.html").read_text(encoding="utf-8")
    recorded = json.loads((study / "best/test_rows.json").read_text())

    section = page.partition('<section id="confusion">')[2].partition("</section>")[0]
    assert "test rows" in section
    cells = [
        int(cell.partition("</td>")[0])
        for cell in section.split("<td>")
        if cell.partition("</td>")[0].isdigit()
    ]
    classification = recorded["classification"]
    pairs = list(
        zip(classification["references"], classification["predictions"], strict=True)
    )
    assert cells == [
        pairs.count((label, prediction))
        for label in range(3)
        for prediction in range(3)
    ]
