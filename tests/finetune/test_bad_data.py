"""A bad data set ends in one line that names the file and the row, before torch loads."""

import json

import pytest
from support.bad_input import (
    ANY_FILE,
    FILE_TYPES,
    ROWS,
    Case,
    Workplace,
    each,
    lines,
    matches,
)

from finetune.files.run_folder import RunFolder

DATA = [
    Case(
        "no-file",
        "dataset.path=no.jsonl",
        f"dataset.path=no.jsonl: no such file or folder; {ANY_FILE}",
    ),
    Case(
        "no-eval-file",
        "dataset.eval_path=./no.csv",
        f"dataset.eval_path=./no.csv: no such file or folder; {ANY_FILE}",
    ),
    Case(
        "a-kind-not-read",
        "dataset.path=d.xml",
        f"dataset.path=d.xml: must be a {FILE_TYPES}",
        {"d.xml": ROWS},
    ),
    Case(
        "folder-without-data",
        "dataset.path=data",
        f"dataset.path=data: the folder has no {FILE_TYPES}",
        {"data/notes.md": "x"},
    ),
    Case("empty-file", "", "dataset.path=d.jsonl: the file is empty", {"d.jsonl": ""}),
    Case("blank-file", "", "dataset.path=d.jsonl: holds no rows", {"d.jsonl": "\n\n"}),
    Case(
        "broken-line",
        "",
        "dataset.path=d.jsonl: line 21 is no whole JSON object (…); a .jsonl file holds one object on each line",
        {"d.jsonl": ROWS + '{"text": "cut\n'},
    ),
    Case(
        "pretty-printed",
        "",
        "dataset.path=d.jsonl: line 1 is no whole JSON object (…); a .jsonl file holds one object on each line",
        {"d.jsonl": '{\n  "text": "a"\n}\n'},
    ),
    Case(
        "one-object",
        "dataset.path=d.json",
        "dataset.path=d.json: line 1 is no whole JSON object (…); a .json file holds a list of objects, or one object…",
        {"d.json": '{\n  "text": "a"\n}\n'},
    ),
    Case(
        "row-in-a-folder",
        "dataset.path=data",
        "dataset.path=data/b.jsonl: row 2: field 'text' is no text but int",
        {"data/a.jsonl": ROWS, "data/b.jsonl": lines({"text": "fine"}, {"text": 5})},
    ),
    Case(
        "broken-list",
        "dataset.path=d.json",
        "dataset.path=d.json: line 3 is broken JSON (…)",
        {"d.json": '[\n{"text": "a"},\n{"text" "b"}]'},
    ),
    Case(
        "line-that-is-no-object",
        "",
        "dataset.path=d.jsonl: line 21 is no JSON object; a .jsonl file holds one object on each line",
        {"d.jsonl": ROWS + '["text"]\n'},
    ),
    Case(
        "no-text-field",
        "",
        "dataset.path=d.jsonl: row 1 has the columns of no format; its fields: body, title; formats: …",
        {"d.jsonl": lines({"body": "b", "title": "t"})},
    ),
    Case(
        "no-named-text-field",
        "dataset.format=text dataset.text_field=body",
        "dataset.path=d.jsonl: row 1 has no field 'body'; its fields: text; format text needs body",
    ),
    Case(
        "text-field-missing-later",
        "",
        "dataset.path=d.jsonl: row 21 has no field 'text'; its fields: tekst; format text needs text",
        {"d.jsonl": ROWS + lines({"tekst": "a"})},
    ),
    Case(
        "wrong-type",
        "",
        "dataset.path=d.jsonl: row 21: field 'text' is no text but int",
        {"d.jsonl": ROWS + lines({"text": 5})},
    ),
    Case(
        "no-chat",
        "dataset.format=chat",
        "dataset.path=d.jsonl: row 1 has no list 'messages' or 'conversations'; its fields: text; format chat needs messages or conversations",
    ),
    Case(
        "message-without-content",
        "",
        "dataset.path=d.jsonl: row 1, message 1: a message must have 'role' and 'content'…",
        {"d.jsonl": lines({"messages": [{"role": "user"}]})},
    ),
    Case(
        "message-that-is-text",
        "",
        "dataset.path=d.jsonl: row 1, message 1: a message must have 'role' and 'content'…",
        {"d.jsonl": lines({"messages": ["hello"]})},
    ),
    Case(
        "no-completion",
        "dataset.format=prompt_completion",
        "dataset.path=d.jsonl: row 1 has no field 'completion'; its fields: prompt; format prompt_completion needs prompt and completion, or …",
        {"d.jsonl": lines({"prompt": "p"})},
    ),
    Case(
        "no-output",
        "dataset.format=alpaca",
        "dataset.path=d.jsonl: row 1 has no field 'output'; its fields: instruction; format alpaca needs instruction and output, or …",
        {"d.jsonl": lines({"instruction": "p"})},
    ),
    Case(
        "call-without-json",
        "",
        "dataset.path=d.jsonl: row 1, message 2: tool_calls must be JSON, but is 'find(0)' (…)",
        {
            "d.jsonl": lines(
                {
                    "conversations": [
                        {"from": "human", "value": "Find it."},
                        {"from": "function_call", "value": "find(0)"},
                    ]
                }
            )
        },
    ),
    Case(
        "column-that-is-not-there",
        "dataset.columns={prompt:frage,completion:text}",
        "dataset.columns.prompt=frage: dataset.path=d.jsonl: row 1 has no such column; its fields: text",
    ),
    Case(
        "template-that-is-no-jinja",
        "dataset.template='{{text'",
        "dataset.template={{text: must be a Jinja template (…)",
    ),
    Case(
        "template-of-a-missing-column",
        "dataset.template='{{titel}}' dataset.columns={completion:text}",
        "dataset.template={{titel}}: dataset.path=d.jsonl: row 1: 'titel' is undefined; its fields: text",
    ),
    Case(
        "ignored-field-of-no-row",
        "dataset.ignore=[reasonning]",
        "dataset.ignore=[reasonning]: no row has such a field; did you mean reasoning…",
    ),
    Case(
        "csv-without-the-field",
        "dataset.path=d.csv",
        "dataset.path=d.csv: row 1 has the columns of no format; its fields: id, body; formats: …",
        {"d.csv": "id,body\n1,hello\n"},
    ),
    Case(
        "csv-short-of-a-header",
        "dataset.path=d.csv",
        "dataset.path=d.csv: holds no rows",
        {"d.csv": "text\n"},
    ),
    Case(
        "corrupt-parquet",
        "dataset.path=d.parquet",
        "dataset.path=d.parquet: no readable Parquet file (…)",
        {"d.parquet": b"PAR1 but not really PAR1"},
    ),
    Case(
        "latin-1",
        "",
        "dataset.path=d.jsonl: line 1 is not UTF-8 text; it looks like cp1252: dataset.encoding=cp1252 reads it",
        {"d.jsonl": '{"text": "ä"}\n'.encode("latin-1")},
    ),
    Case(
        "latin-1-csv",
        "dataset.path=d.csv",
        "dataset.path=d.csv: line 2 is not UTF-8 text; it looks like cp1252: dataset.encoding=cp1252 reads it",
        {"d.csv": "text\nä\n".encode("latin-1")},
    ),
    Case(
        "only-empty-texts",
        "",
        "dataset.path=d.jsonl: no rows are left…3…",
        {"d.jsonl": lines(*[{"text": " "}] * 3)},
    ),
    Case(
        "eval-fraction-of-no-row",
        "dataset.eval_fraction=0.0001",
        "dataset.eval_fraction=0.0001: takes 0 of 20 rows; 0 means none wanted",
    ),
    Case(
        "eval-fraction-of-all-that-is-left",
        "dataset.eval_fraction=0.5 dataset.test_fraction=0.49",
        "dataset.eval_fraction=0.5: takes 10 of 20 rows…",
    ),
    Case(
        "eval-file-is-the-training-file-with-test-rows",
        "dataset.eval_path=d.jsonl dataset.test_fraction=0.2",
        "dataset.test_fraction=0.2: all 4 rows also stand in training or among the evaluation rows "
        "(dataset.eval_path=d.jsonl)",
    ),
    Case(
        "eval-file-is-the-test-file",
        "dataset.eval_path=e.jsonl dataset.test_path=e.jsonl",
        "dataset.test_path=e.jsonl: all 3 rows also stand in training or among the evaluation rows "
        "(dataset.eval_path=e.jsonl)",
        {"e.jsonl": lines(*({"text": f"held {n}"} for n in range(3)))},
    ),
    Case(
        "eval-file-is-the-training-file",
        "dataset.eval_path=d.jsonl dataset.test_fraction=0",
        "dataset.eval_path=d.jsonl: all 20 rows also stand in training",
    ),
    Case(
        "second-source-missing",
        "dataset.path=[d.jsonl,{path:no.jsonl,weight:2}]",
        f"dataset.path=no.jsonl: no such file or folder; {ANY_FILE}",
    ),
    Case(
        "weight-of-no-row",
        "dataset.path=[d.jsonl,{path:e.jsonl,weight:0.001}]",
        "dataset.path=e.jsonl: weight 0.001 takes none of its … training rows",
        {
            "e.jsonl": lines(
                {"text": "one"}, {"text": "two"}, {"text": "three"}, {"text": "four"}
            )
        },
    ),
    Case(
        "bad-row-of-the-second-source",
        "dataset.path=[d.jsonl,e.jsonl]",
        "dataset.path=e.jsonl: row 2: field 'text' is no text but int",
        {"e.jsonl": lines({"text": "one"}, {"text": 2})},
    ),
    Case(
        "all-rows-are-bad",
        "dataset.on_bad_row=skip dataset.format=alpaca",
        "dataset.path=d.jsonl: none of 20 rows can be read; the first, row 1 of d.jsonl: has no field 'instruction'…",
    ),
    Case(
        "no-column-to-group-by",
        "dataset.group_by=author",
        "dataset.group_by=author: dataset.path=d.jsonl: row 1 has no such column; its columns: text",
    ),
    Case(
        "one-group-of-all-rows",
        "dataset.group_by=author",
        "dataset.test_fraction=auto: takes 1 of 8 rows, but 8 of them stay in one part as near twins, or rows of one author",
        {"d.jsonl": lines(*[{"text": f"row {n}", "author": "Ana"} for n in range(8)])},
    ),
]


@each(DATA)
def test_bad_data_is_one_line_before_torch_loads(
    case: Case, workplace: Workplace
) -> None:
    workplace.write({"d.jsonl": ROWS, **case.files})
    before = workplace.files()

    outcome = workplace.call("dataset.path=d.jsonl", *case.arguments.split())

    assert matches(case.says, outcome.error), outcome.error
    assert all(
        line.startswith("data: ") for line in outcome.stderr.splitlines()[:-1]
    ), outcome.stderr
    assert not outcome.torch_imported
    assert workplace.files() == before


@pytest.mark.parametrize("name", ["notes.txt", "train.log"])
def test_bad_data_leaves_a_folder_that_was_there_before(
    name: str, workplace: Workplace
) -> None:
    workplace.write({f"run/{name}": "An earlier line.\n"})

    outcome = workplace.call("dataset.path=no.jsonl", "hydra.run.dir=run")

    assert (workplace.cwd / "run" / name).read_text().startswith("An earlier line.\n")
    result = json.loads((workplace.cwd / "run" / "result.json").read_text())
    assert (result["status"], result["error"]) == ("failed", outcome.error)


def test_bad_data_leaves_the_folder_that_another_process_trains_in(
    workplace: Workplace,
) -> None:
    folder = workplace.cwd / "run"
    workplace.write({"run/": ""})
    with RunFolder(folder).locked():
        outcome = workplace.call("dataset.path=no.jsonl", "hydra.run.dir=run")

    assert outcome.error == f"{folder}: another process is training in this folder"
    assert (folder / ".lock").exists()


def test_a_multiruns_job_with_bad_data_leaves_its_result(workplace: Workplace) -> None:
    outcome = workplace.call("-m", "dataset.path=no.jsonl", "hydra/launcher=basic")

    (result,) = workplace.cwd.glob("outputs/sweeps/*/trials/0/result.json")
    assert json.loads(result.read_text())["error"] in outcome.error
