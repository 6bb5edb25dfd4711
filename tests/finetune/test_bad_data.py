"""A bad data set ends in one line that names the file and the row, before torch loads."""

from support.bad_input import (
    ANY_FILE,
    ROWS,
    Case,
    Workplace,
    assert_the_result_says,
    each,
    lines,
    matches,
)

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
        "dataset.path=d.txt",
        "dataset.path=d.txt: must be a .jsonl .json .csv .parquet file",
        {"d.txt": ROWS},
    ),
    Case(
        "folder-without-data",
        "dataset.path=data",
        "dataset.path=data: the folder has no .jsonl .json .csv .parquet file",
        {"data/notes.txt": "x"},
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
        "dataset.text_field=text: dataset.path=d.jsonl has no such field…its fields: body, title",
        {"d.jsonl": lines({"body": "b", "title": "t"})},
    ),
    Case(
        "no-named-text-field",
        "dataset.format=text dataset.text_field=body",
        "dataset.path=d.jsonl: row 1 has no field 'body'; its fields: text",
    ),
    Case(
        "text-field-missing-later",
        "",
        "dataset.path=d.jsonl: row 21 has no field 'text'; its fields: tekst",
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
        "dataset.path=d.jsonl: row 1 has no list 'messages' or 'conversations'; its fields: text",
    ),
    Case(
        "message-without-content",
        "",
        "dataset.path=d.jsonl: row 1: a message must have 'role' and 'content'…",
        {"d.jsonl": lines({"messages": [{"role": "user"}]})},
    ),
    Case(
        "message-that-is-text",
        "",
        "dataset.path=d.jsonl: row 1: a message must have 'role' and 'content'…",
        {"d.jsonl": lines({"messages": ["hello"]})},
    ),
    Case(
        "no-completion",
        "dataset.format=prompt_completion",
        "dataset.path=d.jsonl: row 1 has no field 'completion'; its fields: prompt",
        {"d.jsonl": lines({"prompt": "p"})},
    ),
    Case(
        "no-output",
        "dataset.format=alpaca",
        "dataset.path=d.jsonl: row 1 has no field 'output'; its fields: instruction",
        {"d.jsonl": lines({"instruction": "p"})},
    ),
    Case(
        "csv-without-the-field",
        "dataset.path=d.csv",
        "dataset.text_field=text: dataset.path=d.csv has no such field…its fields: id, body",
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
        "dataset.path=d.jsonl: is not UTF-8 text (…)",
        {"d.jsonl": '{"text": "ä"}\n'.encode("latin-1")},
    ),
    Case(
        "latin-1-csv",
        "dataset.path=d.csv",
        "dataset.path=d.csv: is not UTF-8 text (…)",
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
        {"e.jsonl": lines({"text": "one"}, {"text": "two"}, {"text": "three"}, {"text": "four"})},
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
        "dataset.test_fraction=0.15: takes 1 of 8 rows, but 8 of them stay in one part as near twins, or rows of one author",
        {"d.jsonl": lines(*[{"text": f"row {n}", "author": "Ana"} for n in range(8)])},
    ),
]


@each(DATA)
def test_bad_data_is_one_line_before_torch_loads(case: Case, workplace: Workplace) -> None:
    workplace.write({"d.jsonl": ROWS, **case.files})

    outcome = workplace.call("dataset.path=d.jsonl", *case.arguments.split())

    assert matches(case.says, outcome.error), outcome.error
    assert all(line.startswith("data: ") for line in outcome.stderr.splitlines()[:-1]), (
        outcome.stderr
    )
    assert not outcome.torch_imported
    assert_the_result_says(workplace, outcome.error)
