"""The report: every kind of study has one, it says what is so, and a browser draws it without the
network."""

import json
import random
import re
import threading
import time
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial
from support.studies import (
    COMPLETE,
    PRUNED,
    kinds,
    made_study,
    made_unchecked,
    text_of,
    trial,
    two_values,
)

from finetune.metrics.names import OF_TOKENS
from sweeps.answer import report
from sweeps.answer.commands import commands
from sweeps.answer.importance import Importance, importances
from sweeps.answer.report import write_report
from sweeps.study.study import OUT_OF_TIME, Study


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_of_study_has_a_report(kind: str, tmp_path: Path) -> None:
    trials, objectives = kinds()[kind]
    study = made_study(tmp_path / kind, trials, *objectives)

    page = text_of(write_report(study))

    assert kind in page
    assert page.count('class="plotly-graph-div"') >= (
        1 if study.trials(COMPLETE) else 0
    )
    assert ("chart-pareto" in page) == (kind == "two-objectives")
    if kind in ("failed", "mixed"):
        assert "&lt;b&gt;out of memory&lt;/b&gt;" in page
        assert "<b>out of memory" not in page


def test_the_page_of_500_trials_is_small_and_takes_little_longer_than_of_100(
    tmp_path: Path,
) -> None:
    draw = random.Random(0)

    def study_of(count: int) -> Study:
        states = [COMPLETE if number % 3 else PRUNED for number in range(count)]
        return made_study(
            tmp_path / str(count), [trial(draw, state) for state in states]
        )

    few, many = study_of(100), study_of(500)

    def seconds(study: Study) -> float:
        began = time.process_time()
        write_report(study)
        return time.process_time() - began

    # The libraries are imported with the first page; about 1.7 times as long is usual.
    write_report(few)
    assert any(seconds(many) < 2.5 * seconds(few) for _ in range(3))
    path = many.folder / "report.html"
    assert path.stat().st_size < 10e6
    assert text_of(path).count("<tr") > 500


def test_a_space_that_changed_on_the_way_is_drawn_as_one(tmp_path: Path) -> None:
    draw = random.Random(0)
    trials = [trial(draw) for _ in range(10)]
    for each in trials[5:]:
        each._distributions["optimizer.learning_rate"] = FloatDistribution(
            1e-5, 1e-1, log=True
        )
        each._distributions["lora.r"] = CategoricalDistribution([4, 8, 16, 32, 64, 128])
    page = text_of(write_report(made_unchecked(tmp_path / "changed", trials)))

    assert "chart-parallel" in page


def test_a_trial_that_ends_meanwhile_is_in_the_next_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = made_study(
        tmp_path / "s",
        [trial(random.Random(0)), *[create_trial(state=TrialState.WAITING)] * 2],
    )

    def end_another(seen: optuna.Study) -> Importance:
        study.optuna.tell(study.optuna.ask().number, 1.0)
        return importances(seen)

    monkeypatch.setattr("sweeps.answer.advice.importances", end_another)
    assert "1 complete" in text_of(write_report(study))
    assert "2 complete" in text_of(write_report(study))


def test_the_report_that_began_last_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = made_study(tmp_path / "s", [])
    later = threading.Thread(target=write_report, args=(study,))

    def render(data: object, live: bool) -> str:
        if later.ident is not None:
            return "the answer"
        later.start()
        later.join(0.5)
        return "no answer yet"

    monkeypatch.setattr(report, "render_page", render)
    path = write_report(study)
    later.join()

    assert path.read_text() == "the answer"


def test_texts_of_the_config_are_shown_as_they_are(tmp_path: Path) -> None:
    study = made_study(tmp_path / "s", [trial(random.Random(0))])
    folder = study.folder_of(0).path
    folder.mkdir(parents=True)
    prompt = "What is ${x in a shell? Und was heißt 变量?"
    (folder / "run.json").write_text(
        json.dumps({"config": {"sample_prompts": [prompt]}})
    )

    assert prompt in text_of(write_report(study))


def test_the_report_names_what_mattered_and_the_rung_at_which_trials_are_compared(
    tmp_path: Path,
) -> None:
    draw = random.Random(0)
    study = made_study(
        tmp_path / "s",
        [trial(draw, COMPLETE if number % 2 else PRUNED) for number in range(24)],
    )

    page = text_of(write_report(study))

    assert re.search(
        r"optimizer\.learning_rate \d\d%; "
        r"not known from 24 trials: (lora\.r, lora\.dropout|lora\.dropout, lora\.r) "
        r"\(at rung 1 of 4\)",
        page,
    )
    assert "chart-importance" in page


def test_the_report_shows_no_importance_of_few_trials(tmp_path: Path) -> None:
    draw = random.Random(0)
    study = made_study(tmp_path / "s", [trial(draw) for _ in range(19)])

    page = text_of(write_report(study))

    assert "not known from 19 trials (needs 20)" in page
    assert "chart-importance" not in page


def test_a_running_trial_has_its_curve(tmp_path: Path) -> None:
    runs = trial(
        random.Random(0),
        TrialState.RUNNING,
        intermediate_values={1: 2.5, 2: 2.25},
        value=None,
    )
    page = text_of(write_report(made_study(tmp_path / "s", [runs])))

    assert "chart-curves" in page
    assert '"name":"running"' in page


def test_a_small_study_says_what_is_missing(tmp_path: Path) -> None:
    page = text_of(write_report(made_study(tmp_path / "s", [trial(random.Random(0))])))

    assert "not known from 1 trial (needs 20)" in page
    assert "Too few trials for advice." in page


def test_the_report_says_what_was_taken_from_earlier_studies(tmp_path: Path) -> None:
    study = made_study(tmp_path / "s", [trial(random.Random(0))])
    assert "Earlier studies" not in text_of(write_report(study))
    result = {"params": {}, "values": [1.0], "rungs": {}}
    note = "1 result for the sampler, 1 point to train; 1 trial left out: 1 (failed)"
    taken = {
        "s0": {"results": [result], "points": [{}], "note": note},
        # As it was stored before there were notes.
        "s1": {"results": [result, result], "points": []},
    }
    study.optuna.set_user_attr("earlier", taken)
    page = text_of(write_report(study))
    assert f"s0: {note}" in page
    assert "s1: 2 results for the sampler, 0 points to train" in page


def test_several_objectives_have_no_one_winner(tmp_path: Path) -> None:
    draw = random.Random(0)
    study = made_study(
        tmp_path / "s",
        [two_values(draw) for _ in range(9)],
        "eval/loss",
        "adapter/parameters",
    )
    page = text_of(write_report(study))

    front = len(study.optuna.best_trials)
    assert f"is the first of {front} trials on the Pareto front" in page
    assert "Too few trials" not in page
    assert "confirm" not in dict(commands(study))


def test_every_number_of_objectives_shows_who_is_on_the_front(tmp_path: Path) -> None:
    values = [[0.0, 9.0, 9.0, 9.0], [9.0, 0.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.5]]
    study = made_study(
        tmp_path / "s",
        [create_trial(values=each) for each in values],
        "a/1",
        "a/2",
        "a/3",
        "a/4",
    )

    assert text_of(write_report(study)).count("<td>on the Pareto front</td>") == 2


def test_of_an_objective_that_is_maximised_the_largest_wins(tmp_path: Path) -> None:
    draw = random.Random(0)
    study = made_study(
        tmp_path / "s",
        [trial(draw) for _ in range(24)],
        "eval/accuracy",
        direction="maximize",
    )
    largest = max(study.trials(), key=lambda each: each.value)

    page = text_of(write_report(study))

    name = f"eval/accuracy ({OF_TOKENS})"
    assert f"Trial {largest.number} wins with {name} {largest.value:.4f}" in page
    assert re.search(
        r"optimizer\.learning_rate: \d of the best 8 trials are at the lower end", page
    )
    assert f"{name} (maximize)" in page


def test_test_rows_that_gave_no_number_are_no_proof(tmp_path: Path) -> None:
    from finetune.run.recorded_evaluation import read_test_evaluation

    study = made_study(tmp_path / "s", [trial(random.Random(0))])
    folder = study.folder_of(0)
    folder.path.mkdir(parents=True)
    folder.test_rows.write_text(
        json.dumps({"row_losses": [1.0, None], "row_tokens": [1, 1], "accuracy": 0.5})
    )

    assert read_test_evaluation(folder) is None


def test_what_time_has_cut_is_not_saved_by_pruning(tmp_path: Path) -> None:
    cut = trial(random.Random(0), PRUNED)
    cut.user_attrs["reason"] = OUT_OF_TIME
    study = made_study(tmp_path / "s", [cut])
    folder = study.folder_of(0).path
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(
        json.dumps({"train_tokens": 1500, "train_seconds": 15})
    )

    assert "<b>0</b><span>tokens saved by pruning" in text_of(write_report(study))


def test_counts_what_pruning_has_saved(tmp_path: Path) -> None:
    draw = random.Random(0)
    study = made_study(tmp_path / "s", [trial(draw), trial(draw, PRUNED)])
    places = [
        study.folder_of(0).path,
        study.folder_of(1).path,
        study.folder / "confirm" / "0-seed1",
    ]
    for folder, tokens in zip(places, (6000, 1500, 6100), strict=True):
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(
            json.dumps({"train_tokens": tokens, "train_seconds": tokens / 100})
        )

    page = text_of(write_report(study))

    assert "<b>7,500</b><span>tokens trained" in page
    assert "<b>6,100</b><span>tokens trained by the confirmation, in addition" in page
    assert "<b>4,500</b><span>tokens saved by pruning" in page
    assert "<b>38%</b>" in page
