"""The labels of training rows, the rows with each label, and the scores, by hand."""

from pathlib import Path
from typing import Any

import pytest
from support.rows import chat

from finetune.config.sections.evaluation import EvaluationSettings
from finetune.data.encoding import Encoder
from finetune.data.types import Row
from finetune.errors import ConfigError
from finetune.metrics.classification import (
    METRIC,
    UNSCORED,
    Classification,
    confusion_lines,
)
from finetune.metrics.labels import LabelledRows, find_labels


def rows_of(*answers: str) -> list[Row]:
    """Rows with these answers."""
    return [
        Row(chat(f"Question {number}?", answer), "rows.csv", number + 1)
        for number, answer in enumerate(answers)
    ]


def settings(**values: Any) -> EvaluationSettings:
    return EvaluationSettings(metrics=["classification"], **values)


@pytest.mark.parametrize(
    ("references", "predictions", "accuracy", "balanced", "f1"),
    [
        ("aab", "aab", 1, 1, 1),
        ("aab", "aaa", 2 / 3, 1 / 2, (4 / 5 + 0) / 2),
        # A label that only a prediction has counts for F1, not for the balanced accuracy.
        ("aabb", "aacb", 3 / 4, 3 / 4, (1 + 2 / 3 + 0) / 3),
        ("aaaabc", "aabbbc", 4 / 6, (1 / 2 + 1 + 1) / 3, (4 / 6 + 2 / 4 + 1) / 3),
        ("ab", "ba", 0, 0, 0),
    ],
)  # fmt: skip
def test_scores(
    references: str, predictions: str, accuracy: float, balanced: float, f1: float
) -> None:
    scores = METRIC.score(list(predictions), list(references), rows_of(*references))

    rows = scores["label_accuracy"]
    assert sum(rows) / len(rows) == pytest.approx(accuracy)
    assert scores["balanced_accuracy"] == pytest.approx(balanced)
    assert scores["macro_f1"] == pytest.approx(f1)


def test_a_row_without_prediction_is_not_scored() -> None:
    scores = METRIC.score(["a", UNSCORED], ["a", "b"], rows_of("a", "b"))

    assert scores["label_accuracy"] == [1, None]
    assert scores["balanced_accuracy"] == scores["macro_f1"] == 1


def test_labels_are_the_training_rows_answers_with_their_most_frequent_text() -> None:
    rows = rows_of("pos", " neg", "neg", " neg", "pos", "10", "10")

    assert list(find_labels(rows, settings()).items()) == [
        ("10", "10"), ("neg", " neg"), ("pos", "pos")
    ]  # fmt: skip


def with_call(row: Row) -> Row:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    row["messages"][-1]["tool_calls"] = [call]
    return row


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (rows_of(*"aabbccdd"), "rows.csv: row 7 has different answer number 4; allowed: evaluation.max_labels=3"),
        (rows_of(*"aaa"), "needs training rows with at least two different answers"),
        (rows_of(*"aabc"), None),
        (rows_of(*"abc"), "needs a small set of answers, not 3 training rows with 3 different answers"),
        (rows_of("a", "b", "<think>so</think>a", "b"), "rows.csv: row 3: its answer has a think block"),
        ([*rows_of("a", "b", "a"), with_call(rows_of("b")[0])], "rows.csv: row 1: its answer has tool_calls beside the label"),
    ],
)  # fmt: skip
def test_answers_that_are_no_labels_are_refused(
    rows: list[Row], says: str | None
) -> None:
    if says is None:
        rows = rows_of(*"aabbcc")
        assert len(find_labels(rows, settings(max_labels=3))) == 3
        return
    with pytest.raises(ConfigError) as error:
        find_labels(rows, settings(max_labels=3))
    assert str(error.value) == f"evaluation.metrics=classification: {says}"


def test_a_held_out_answer_outside_the_labels_is_refused(tokenizer: Any) -> None:
    labels = {"a": "a", "b": "b"}

    with pytest.raises(ConfigError) as error:
        LabelledRows.create(
            rows_of("a", "c"), labels, settings(), tokenizer, None, None
        )
    assert str(error.value) == (
        "evaluation.metrics=classification: rows.csv: row 2: its answer 'c' is none of the "
        "training rows': a, b"
    )


@pytest.fixture
def tokenizer(tiny_base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.mark.parametrize("template", [True, False])
def test_candidates_are_the_rows_as_training_encodes_them(
    tokenizer: Any, template: bool
) -> None:
    """Labels that begin alike, or with which another one begins, keep their own end."""
    if not template:
        tokenizer.chat_template = None
    labels = {label: label for label in ("no", "none", "no one", "yes")}
    rows = rows_of(*labels)

    labelled = LabelledRows.create(rows, labels, settings(), tokenizer, None, None)

    encoder = Encoder(tokenizer)
    expected = []
    for row in rows:
        question = row["messages"][0]["content"]
        for label in labels:
            (example,) = encoder.encode(chat(question, label)).examples
            expected.append({"input_ids": example.ids, "labels": example.labels})
            assert example.labels[-1] != -100
    assert list(labelled.candidates) == expected
    assert labelled.candidates[2:4] == expected[2:4]


def test_of_a_chat_only_the_last_answer_is_scored(tokenizer: Any) -> None:
    (row,) = rows_of("a")
    row["messages"] = [*chat("Before?", "Earlier")["messages"], *row["messages"]]
    labels = {"a": "a", "b": "b"}

    first, second = LabelledRows.create(
        [row], labels, settings(), tokenizer, None, None
    ).candidates

    for label, example in (("a", first), ("b", second)):
        learnt = [token for token in example["labels"] if token != -100]
        assert tokenizer.decode(learnt).strip() == f"{label}<|im_end|>"


def test_a_row_that_is_too_long_with_a_label_is_not_classified(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    labels = {"a": "a", "bb bb bb bb": "bb bb bb bb"}
    rows = rows_of("a", "a")
    rows[1]["messages"][0]["content"] *= 9
    labelled = LabelledRows.create(rows, labels, settings(), tokenizer, None, 60)

    assert labelled.candidates.answers == [0]
    assert "1 of 2 rows are not classified" in caplog.text


def test_confusion_as_a_table() -> None:
    classification = Classification(
        ("no", "a long label that is cut"), (0, 0, 1, 1, 1), (0, 1, 1, 1, None)
    )

    assert classification.confusion() == [[1, 1], [0, 2]]
    assert confusion_lines(classification) == [
        "rows by their label (lines) and the most likely label (columns)",
        "                     no  a long label th…",
        "no                    1                 1",
        "a long label th…      0                 2",
    ]


def test_confusions_of_many_labels_are_listed() -> None:
    labels = tuple(f"l{number}" for number in range(12))
    classification = Classification(labels, (0, 1, 1, 2), (0, 3, 3, 0))

    assert confusion_lines(classification) == [
        "12 labels; the most frequent confusions:",
        "2 rows of l1 as l3",
        "1 rows of l2 as l0",
    ]
