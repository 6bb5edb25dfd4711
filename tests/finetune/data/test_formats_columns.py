"""Columns: usual names, the names that the config gives, templates, classes, and the line on them."""

import json
from typing import Any

import pytest
from support.conversion import convert, format_line, open_converter
from support.models import Row
from support.rows import A, Q, asked, chat

ASKED = {"role": "user", "content": Q}
ANSWERED = {"role": "assistant", "content": A}
EARLIER = [
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Hello, Bo."},
]
PAIRS = [
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("problem", "solution"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("input", "output"),
    ("text", "label"),
]


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_usual_names_of_prompt_and_completion(prompt: str, completion: str) -> None:
    assert convert({prompt: Q, completion: A}) == asked(Q, A)


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({**chat(Q, A), "prompt": "p", "completion": "c"}, "chat (messages); not used: prompt, completion"),
        ({"question": Q, "answer": A, "text": "note"}, "prompt_completion (prompt: question, completion: answer); not used: text"),
        ({"prompt": Q, "completion": A, "question": "q", "answer": "a"}, "prompt_completion (prompt, completion); not used: question, answer"),
        ({"question": Q, "answer": A, "instruction": "i", "output": "o"}, "prompt_completion (prompt: question, completion: answer); not used: instruction, output"),
        ({"instruction": Q, "input": "", "output": A}, "alpaca (prompt: instruction, completion: output, input)"),
        ({"instruction": Q, "output": A, "prompt": "rendered"}, "alpaca (prompt: instruction, completion: output); not used: prompt"),
        ({"instruction": Q, "context": "", "response": A, "category": "qa"}, "alpaca (prompt: instruction, completion: response, input: context); not used: category"),
        ({"text": Q, "label": A, "idx": 5}, "prompt_completion (prompt: text, completion: label); not used: idx"),
        ({"messages": None, "question": Q, "answer": A}, "prompt_completion (prompt: question, completion: answer)"),
        ({"prompt": None, "completion": None, "question": Q, "answer": A, "id": None}, "prompt_completion (prompt: question, completion: answer)"),
    ],
    ids=["chat", "pair", "two_pairs", "pair_and_alpaca", "alpaca", "rendered", "dolly", "label", "null_chat", "null_pair"],
)  # fmt: skip
def test_the_order_of_formats_and_the_line_that_says_it(row: Row, line: str) -> None:
    assert convert(row) == asked(Q, A)
    assert format_line(row) == f"dataset.path=rows.jsonl: format {line}"


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "Just text.", "label": None}, "Just text."),
        ({"text": "Just text.", "question": None, "answer": None}, "Just text."),
        ({"text": "Just text.", "id": 3}, "Just text."),
        ({"text": "Just text.", "messages": None}, "Just text."),
        ({"text": "Just text.", "score": 0.9}, "Just text."),
    ],
)
def test_text_alone_is_plain_text(row: Row, text: str) -> None:
    assert convert(row) == [{"text": text}]


def test_columns_that_are_not_used_are_named_once_whatever_row_has_them() -> None:
    rows = [
        {**chat(Q, A), "a": 1},
        {**chat(Q, A), "b": 2, "a": 1},
        {**chat(Q, A), "c": None},
    ]
    line = "dataset.path=rows.jsonl: format chat (messages); not used: a, b"
    assert format_line(*rows) == line


def test_the_same_line_is_not_repeated_for_another_path() -> None:
    formats, _ = open_converter()
    lines = []
    for path, row in (("a", chat(Q, A)), ("b", chat(Q, A)), ("c", {"text": "x"})):
        converter = formats.open("dataset.path", path)
        converter.convert(row, path, 1)
        lines.append(converter.finish())
    assert lines == [
        "dataset.path=a: format chat (messages)",
        None,
        "dataset.path=c: format text (text)",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (4, "4"),
        (-1, "-1"),
        (0, "0"),
        (2.0, "2"),
        (True, "true"),
        (False, "false"),
        ("b", "b"),
    ],
)
@pytest.mark.parametrize(
    "pair", [("text", "label"), ("prompt", "completion"), ("instruction", "output")]
)
def test_a_whole_number_and_a_boolean_are_written_as_text(
    value: Any, text: str, pair: tuple[str, str]
) -> None:
    assert convert(dict(zip(pair, (Q, value), strict=True))) == asked(Q, text)


def test_a_class_is_written_by_its_name() -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    from finetune.data.class_names import class_names

    features = Features(
        {"text": Value("string"), "label": ClassLabel(names=["bad", "good"])}
    )
    rows = Dataset.from_dict({"text": [Q, Q], "label": [1, 0]}, features=features)
    _, converter = open_converter()
    names = class_names(rows)
    contents = [
        converter.convert(row, "x", n, names) for n, row in enumerate(rows, start=1)
    ]
    assert contents == asked(Q, "good") + asked(Q, "bad")
    assert class_names([{"label": 1}]) == {}


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ({"prompt": "frage", "completion": "antwort"}, {"frage": Q, "antwort": A}),
        ({"prompt": "a", "completion": "b"}, {"a": Q, "b": A, **chat("other", "chat")}),
        ({"messages": "dialog"}, {"dialog": chat(Q, A)["messages"]}),
        ({"messages": "dialog"}, {"dialog": chat(Q, A)["messages"], "messages": []}),
        ({"completion": "antwort"}, {"question": Q, "antwort": A}),
        ({"prompt": "frage"}, {"frage": Q, "answer": A}),
        ({"completion": "antwort"}, {"instruction": Q, "input": "", "antwort": A}),
        (
            {"prompt": "prompt", "completion": "chosen"},
            {"prompt": Q, "chosen": A, "rejected": "5"},
        ),
        (
            {"prompt": "text", "completion": "stars"},
            {"text": Q, "stars": A, "label": 3},
        ),
    ],
)
def test_columns_of_any_name(columns: dict[str, str], row: Row) -> None:
    assert convert(row, columns=columns) == asked(Q, A)


@pytest.mark.parametrize(
    "pairs",
    [[["Hello.", "Hello, Bo."]], json.dumps([["Hello.", "Hello, Bo."]]), EARLIER],
)
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": Q, "completion": A},
        {"question": Q, "answer": A},
        {"instruction": Q, "input": None, "output": A},
        {"prompt": [ASKED], "completion": [ANSWERED]},
        {"prompt": [ASKED], "completion": A},
        {"prompt": Q, "completion": [ANSWERED]},
    ],
    ids=["prompt", "question", "alpaca", "lists", "list_and_text", "text_and_list"],
)
def test_history_and_system_stand_before_the_prompt(row: Row, pairs: Any) -> None:
    system = {"role": "system", "content": "Be short."}
    turns = [system, *EARLIER, ASKED, ANSWERED]
    assert convert({**row, "system": "Be short.", "history": pairs}) == [
        {"messages": turns}
    ]


def test_columns_may_name_system_history_and_tools() -> None:
    columns = {"system": "persona", "history": "before", "tools": "apis"}
    row = {
        "prompt": Q,
        "completion": A,
        "persona": "Be short.",
        "before": [["Hello.", "Hello, Bo."]],
    }
    [content] = convert({**row, "apis": [{"name": "f"}]}, columns=columns)
    assert [message["role"] for message in content["messages"]] == ["system"] + [
        "user",
        "assistant",
    ] * 2
    assert content["tools"] == [{"type": "function", "function": {"name": "f"}}]


def test_answers_within_a_prompt_are_learnt_as_in_every_chat() -> None:
    [content] = convert({"prompt": [*EARLIER, ASKED], "completion": [ANSWERED]})
    answers = [
        message for message in content["messages"] if message["role"] == "assistant"
    ]
    assert [answer.get("train", True) for answer in answers] == [True, True]


@pytest.mark.parametrize(
    ("template", "row", "prompt"),
    [
        ("{{title}}: {{body}}", {"title": "T", "body": "B", "answer": A}, "T: B"),
        ("{{ question }}", {"question": Q, "completion": A}, Q),
        (
            "{% if note %}{{note}} {% endif %}{{q}}",
            {"q": Q, "note": None, "label": A},
            Q,
        ),
        ("{{ choices | join(', ') }}", {"choices": ["a", "b"], "answer": A}, "a, b"),
        ("{{ a + b }}?", {"a": 1, "b": 2, "output": A}, "3?"),
        ("{{ t | default('none') }}", {"answer": A}, "none"),
    ],
)
def test_a_template_makes_the_prompt(template: str, row: Row, prompt: str) -> None:
    assert convert(row, template=template) == asked(prompt, A)


def test_the_line_of_a_template_names_what_it_does_not_read() -> None:
    row = {"t": "T", "id": 1, "answer": A}
    line = "format prompt_completion (prompt: dataset.template, completion: answer); not used: id"
    assert format_line(row, template="{{t}}") == f"dataset.path=rows.jsonl: {line}"
