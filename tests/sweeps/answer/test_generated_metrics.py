"""A study whose objective is a metric of generated answers, from its direction to its answer."""

import json
from pathlib import Path

import pytest
from support.commands import Station
from support.configs import study_overrides
from support.evaluations import evaluation
from support.rows import chat
from support.runs import final, write_jsonl

from finetune.engine.evaluation import Evaluation
from finetune.metrics.metric import Score
from sweeps.answer.compare import compare_adapters, compare_configs, compare_seeds
from sweeps.study.study import Study


@pytest.fixture(scope="module")
def study(
    station: Station, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a study that maximises exact match."""
    place = tmp_path_factory.mktemp("exact")
    rows = [chat(f"Is {number} a number?", "Yes") for number in range(260)]
    write_jsonl(place / "rows.jsonl", rows)
    ended = station.run(
        *study_overrides(tiny_base, "s"), "dataset.path=rows.jsonl", "dataset.limit=null",
        "dataset.eval_fraction=20e-2", "dataset.test_fraction=20e-2", "evaluation=exact_match",
        "objective=eval/exact_match", "evaluation.max_new_tokens=2", "trainer.max_steps=16",
        "optimizer.learning_rate=1e-2", "~search", "lora.r=choice(1,16)",
        "hydra.sweeper.n_trials=3", "hydra.sweeper.slots=3", cwd=place,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return place / "outputs" / "sweeps" / "s"


def test_the_study_maximises_it(study: Path) -> None:
    loaded = Study.load(study)

    assert loaded.optuna.direction.name == "MAXIMIZE"
    assert loaded.optuna.user_attrs["terms"]["hydra.sweeper.direction"] == ["maximize"]
    best = loaded.ranked()[0]
    values = [trial.value for trial in loaded.trials() if trial.value is not None]
    assert best.value == max(values) == 1
    # Rungs report it, so that the pruner judges by it.
    reported = best.intermediate_values
    assert reported[max(reported)] == best.value


def test_the_answer_is_about_it(study: Path) -> None:
    answer = json.loads((study / "answer.json").read_text())
    test = answer["test"]
    winner = study / "trials" / str(answer["trial"])

    assert answer["objective"] == {"eval/exact_match": 1}
    assert test["objective"]["metric"] == "test/exact_match"
    expected = final(winner)["metrics"]["test/exact_match"]
    assert test["objective"]["winner"] == expected
    assert "test/exact_match" in (study / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_confirmation_is_about_it(station: Station, study: Path) -> None:
    ended = station.run(
        "confirm",
        str(study),
        "--seeds",
        "2",
        module="sweeps",
        cwd=study.parent.parent.parent,
    )

    assert ended.returncode == 0, ended.stderr
    confirmation = json.loads((study / "confirm.json").read_text())
    assert confirmation["objective"] == "eval/exact_match"
    assert {entry["metric"] for entry in confirmation["comparisons"]} == {
        "test/exact_match"
    }


def scored(values: list[float | None], rising: bool = True) -> Evaluation:
    """An evaluation whose rows have these scores."""
    sums = tuple(0.0 if value is None else value for value in values)
    counts = tuple(int(value is not None) for value in values)
    score = Score(sum(sums) / sum(counts), rising, sums, counts)
    of_rows = evaluation([1.0] * len(values), [1] * len(values))
    return Evaluation(
        of_rows.row_losses, of_rows.row_tokens, of_rows.row_correct, {"m": score}
    )


@pytest.mark.parametrize(("rising", "verdict"), [(True, "better"), (False, "worse")])
def test_adapters_are_compared_by_the_scores_of_rows(
    rising: bool, verdict: str
) -> None:
    first = scored([1.0] * 80 + [0.0] * 20, rising)
    second = scored([1.0] * 40 + [0.0] * 60, rising)

    comparison = compare_adapters(first, second, "m")

    assert comparison.difference == pytest.approx(0.4)
    assert comparison.low is not None
    assert comparison.low > 0
    assert comparison.verdict == verdict


def test_rows_that_one_side_lacks_are_left_out() -> None:
    first = scored([None] * 50 + [1.0, 0.0] * 50)
    second = scored([1.0] * 50 + [0.0, 0.0] * 50)

    comparison = compare_adapters(first, second, "m")

    assert comparison.difference == pytest.approx(0.5)


def test_one_number_for_all_rows_has_no_interval() -> None:
    first, second = (
        Evaluation((1.0,), (1,), (0,), {"m": Score(value, True)})
        for value in (0.7, 0.4)
    )

    comparisons = [
        compare_adapters(first, second, "m"),
        compare_configs(first, [second, second], 3, "m"),
        compare_seeds([first, first], [second, second], "m"),
    ]

    for comparison in comparisons:
        assert comparison.difference == pytest.approx(0.3)
        assert comparison.low is None
        assert comparison.verdict == "one number for all rows"
