"""Functions of the user's: faults of the function, and of what it returns."""

import itertools
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.rows import chat

from finetune.config.sections.evaluation import EvaluationSettings
from finetune.data.types import Row
from finetune.errors import ConfigError
from finetune.metrics import judge
from finetune.metrics.answers import answers_of
from finetune.metrics.load import load_metrics
from finetune.metrics.metric import Metric
from finetune.metrics.scores import score_answers, scores_by_source

Write = Callable[[str], str]
NUMBERS = itertools.count()


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a module into the working directory; returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(judge, "FIRST_WAIT_SECONDS", 0.001)

    def make(text: str) -> str:
        name = f"user_metrics_{next(NUMBERS)}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return make


def load(*paths: str, **settings: Any) -> list[Metric]:
    return load_metrics(EvaluationSettings(metrics=list(paths), **settings))


ROWS = [
    Row(chat(f"Question {n}?", f"Answer {n}"), ("a.jsonl", "b.jsonl")[n % 2], n + 1)
    for n in range(6)
]
ANSWERS = answers_of(ROWS, EvaluationSettings())
RIGHT = [answer.reference for answer in ANSWERS]


@pytest.mark.parametrize(
    ("text", "name", "says"),
    [
        ("", "score", "the module … has no score"),
        ("score = 3", "score", "is a int; must be a function"),
        ("def score(a, b): ...", "score", "must take (predictions, references, rows), but takes (a, b)"),
        ("def score(a, b, c): ...\nscore.higher_is_better = 'no'", "score", "its attribute higher_is_better must be True or False"),
        ("def score(a, b, c): ...\nscore.names = 'f1'", "score", "its attribute names must be a list of texts"),
        ("def score(a, b, c): ...\nscore.names = ['loss']", "score", "eval/loss would have two meanings"),
        ("def score(a): ...\nscore.judge = True", "score", "must take (prediction, reference, row), but takes (a)"),
        ("import no_such_package", "score", "can't be imported (ModuleNotFoundError: No module named 'no_such_package')"),
        ("1 / 0", "score", "can't be imported (ZeroDivisionError: division by zero)"),
        ("raise SystemExit('bye')", "score", "can't be imported (SystemExit: bye)"),
        ("def loss(a, b, c): ...", "loss", "eval/loss would have two meanings"),
        ("def exact_match(a, b, c): ...", "exact_match", None),
    ],
)  # fmt: skip
def test_faults_of_a_function_are_one_line(
    write: Write, text: str, name: str, says: str | None
) -> None:
    path = f"{write(text)}.{name}"
    if says is None:
        assert load(path)[0].names == (name,)
        return
    with pytest.raises(ConfigError) as error:
        load(path)

    line = str(error.value)
    assert line.startswith("evaluation.metrics=")
    assert all(part in line for part in says.split("…"))
    assert "\n" not in line


def test_a_missing_module_is_named() -> None:
    with pytest.raises(ConfigError) as error:
        load("no_such_module.score")

    said = "evaluation.metrics=no_such_module.score: there is no module no_such_module"
    assert str(error.value) == said


FAIL = "def score(predictions, references, rows):\n"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("    return [1] * (len(rows) - 1)", "returned 5 scores for 6 answers"),
        ("    return ['x'] * len(rows)", "a.jsonl: row 1: returned 'x': must be a number"),
        ("    return [1, 1, float('nan'), 1, 1, 1]", "a.jsonl: row 3: returned nan"),
        ("    return 'good'", "one number for all rows: returned 'good'"),
        ("    return {'loss': 1.0}", "returned the name 'loss'"),
        ("    if any('4' in p for p in predictions): raise ValueError('bad')\n    return [1] * len(rows)", "a.jsonl: row 5: ValueError: bad"),
        ("    if len(rows) == 6: raise ValueError('six')\n    return [1] * len(rows)", ": ValueError: six"),
    ],
)  # fmt: skip
def test_faults_of_a_result_name_the_row(write: Write, body: str, says: str) -> None:
    metrics = load(f"{write(FAIL + body)}.score")

    with pytest.raises(ConfigError) as error:
        score_answers(metrics, ANSWERS, RIGHT)

    assert says in str(error.value)
    assert str(error.value).startswith(metrics[0].path)


def test_numbers_of_other_libraries_are_taken(write: Write) -> None:
    text = "import numpy\n" + FAIL + "    return numpy.arange(6, dtype='float32')"
    metrics = load(f"{write(text)}.score")

    results = score_answers(metrics, ANSWERS, RIGHT)

    assert results["score"].values == [0, 1, 2, 3, 4, 5]
    assert np.isscalar(results["score"].values[0])  # type: ignore[index]


def test_rows_that_are_not_scored_and_single_numbers(write: Write) -> None:
    text = (
        FAIL
        + "    return {'share': [1, 0, None, None, 1, 1], 'number': len(rows) / 2}\n"
        + "score.names = ['share', 'number']\nscore.higher_is_better = False"
    )
    metrics = load(f"{write(text)}.score")
    results = score_answers(metrics, ANSWERS, RIGHT)

    scores = scores_by_source(results, ANSWERS, RIGHT, {})

    assert scores["share"].value == 0.75
    assert scores["share"].row_counts == (1, 1, 0, 0, 1, 1)
    assert not scores["share"].higher_is_better
    assert scores["number"].value == 3.0
    assert scores["number"].row_counts == ()


def test_each_source_has_its_scores(write: Write) -> None:
    text = FAIL + "    return [r.number for r in rows]\n"
    text += "def count(predictions, references, rows): return len(rows)"
    module = write(text)
    metrics = load(f"{module}.score", f"{module}.count")
    results = score_answers(metrics, ANSWERS, RIGHT)

    scores = scores_by_source(results, ANSWERS, RIGHT, {"a.jsonl": "a", "b.jsonl": "b"})

    values = {name: score.value for name, score in scores.items()}
    assert values == {
        "score": 3.5, "count": 6, "a/score": 3, "a/count": 3, "b/score": 4, "b/count": 3,
    }  # fmt: skip


JUDGE = """
import pathlib, threading
calls = []
lock = threading.Lock()
def score(prediction, reference, row):
    with lock:
        calls.append(prediction)
        attempt = calls.count(prediction)
    if "3" in prediction or ("4" in prediction and attempt < 2):
        raise OSError("the judge is out of reach")
    return 0.5
score.judge = True
"""


def test_a_judge_is_asked_again_and_its_failures_are_no_scores(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    module = write(JUDGE)
    metrics = load(f"{module}.score", retries=1)

    results = score_answers(metrics, ANSWERS, RIGHT)

    assert results["score"].values == [0.5, 0.5, 0.5, None, 0.5, 0.5]
    calls = __import__(module).calls
    assert calls.count("Answer 3") == 2
    assert calls.count("Answer 4") == 2
    assert "1 of 6 calls failed" in caplog.text
    assert "OSError: the judge is out of reach" in caplog.text


def test_a_judges_scores_are_cached_by_row_and_prediction(write: Write) -> None:
    module = write(JUDGE)
    metrics = load(f"{module}.score", retries=1)
    score_answers(metrics, ANSWERS, RIGHT)
    calls = __import__(module).calls
    calls.clear()

    score_answers(metrics, ANSWERS, ["another", *RIGHT[1:]])

    # The failed one is asked again, and the other prediction; what was answered is not.
    assert sorted(calls) == ["Answer 3", "Answer 3", "another"]


def test_a_judge_is_asked_by_as_many_threads_as_wanted(write: Write) -> None:
    text = """
import threading
barrier = threading.Barrier(3, timeout=20)
def score(prediction, reference, row):
    barrier.wait()
    return 1
score.judge = True
"""
    metrics = load(f"{write(text)}.score", concurrency=3, retries=0)
    before = set(threading.enumerate())

    results = score_answers(metrics, ANSWERS, RIGHT)

    assert results["score"].values == [1] * 6
    assert set(threading.enumerate()) <= before


def test_turns_all_asks_for_each_answer_after_the_rows_own_turns() -> None:
    row = Row(chat("One?", "1", "Two?", "2"), "a.jsonl", 1)
    row["messages"].insert(0, {"role": "system", "content": "Be short."})

    every = answers_of([row, row], EvaluationSettings(turns="all", limit=1))
    (last,) = answers_of([row], EvaluationSettings())

    assert [answer.reference for answer in every] == ["1", "2"]
    assert every[0].prompt.messages == row["messages"][:2]
    assert every[1].prompt.messages == row["messages"][:4]
    assert last == every[1]


def test_the_turns_of_a_row_are_one_row_of_the_score() -> None:
    rows = [Row(chat("One?", "1", "Two?", "2")), Row(chat("Three?", "3"))]
    answers = answers_of(rows, EvaluationSettings(turns="all"))
    metrics = load("exact_match")
    results = score_answers(metrics, answers, ["1", "no", "3"])

    score = scores_by_source(results, answers, ["1", "no", "3"], {})["exact_match"]

    assert score.row_sums == (1, 1)
    assert score.row_counts == (2, 1)
    assert math.isclose(score.value, 2 / 3)
