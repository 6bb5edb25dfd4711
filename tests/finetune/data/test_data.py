"""Rows and tokens: what is read, how it is split, what is labelled, in which order it is visited."""

import csv
import dataclasses
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from support.configs import compose
from support.runs import write_jsonl

from finetune.config.schema import DatasetSettings, RunConfig
from finetune.data.formats import first_question
from finetune.data.rows import load_all_rows, load_rows
from finetune.data.tokens import IGNORED, _listed, as_list, left_out_count, tokenize
from finetune.data.types import Rows, fingerprint
from finetune.engine.schedule import epoch_order
from finetune.errors import ConfigError
from finetune.files.atomic import create_folder

pytestmark = pytest.mark.usefixtures("fresh_cache", "one_thread")
Row = dict[str, Any]
Settings = Callable[..., DatasetSettings]

HISTORY_WITHOUT_REASONING = (
    "{%- set seen = namespace(last_question=0) -%}"
    "{%- for m in messages -%}{%- if m['role'] == 'user' -%}{%- set seen.last_question = loop.index0 -%}{%- endif -%}"
    "{%- endfor -%}{%- for m in messages -%}{%- set content = m['content'] -%}"
    "{%- if m['role'] == 'assistant' and loop.index0 < seen.last_question -%}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') -%}"
    "{%- elif m['role'] == 'assistant' and '</think>' not in content -%}"
    "{%- set content = '<think>\n\n</think>\n\n' + content -%}{%- endif -%}"
    "{{- '<|im_start|>' + m['role'] + '\n' + content + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
"""Drops the reasoning of earlier answers and gives the last one an empty reasoning, as Qwen3's template does."""

SYSTEM_IN_LAST_QUESTION = (
    "{%- if messages[0]['role'] == 'system' -%}{%- set system = messages[0]['content'] -%}"
    "{%- set turns = messages[1:] -%}{%- else -%}{%- set turns = messages -%}{%- endif -%}{%- for m in turns -%}"
    "{%- if m['role'] == 'user' and loop.last and system is defined -%}"
    "{{- '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' -}}"
    "{%- elif m['role'] == 'user' -%}{{- '[INST] ' + m['content'] + '[/INST]' -}}"
    "{%- else -%}{{- ' ' + m['content'] + eos_token -}}{%- endif -%}{%- endfor -%}"
)
"""Puts the system's text into a question that stands last, as the template of Mistral-7B-Instruct-v0.3 does."""


@pytest.fixture(scope="module")
def _defaults() -> DatasetSettings:
    return compose("dataset.path=rows.jsonl").dataset


@pytest.fixture
def settings(_defaults: DatasetSettings) -> Settings:
    """The default data set settings with some changed, nothing held out."""

    def make(**changes: Any) -> DatasetSettings:
        return dataclasses.replace(_defaults, **{"eval_fraction": 0.0, "test_fraction": 0.0} | changes)

    return make


@pytest.fixture
def tokenizer(tiny: Callable[..., RunConfig]) -> Any:
    """The tiny base's tokenizer as a run loads it."""
    return load_tokenizer(tiny())


def load_tokenizer(config: RunConfig) -> Any:
    """The tokenizer of a config, as a run loads it."""
    from finetune.model import loading as base
    from finetune.model.source import find_base

    return base.load_tokenizer(find_base(config.model), config.model)


def texts(count: int, word: str = "row") -> list[Row]:
    """Different rows of plain text."""
    return [{"text": f"{word} number {index}"} for index in range(count)]


def chat(*contents: str) -> Row:
    """A chat row; the user begins."""
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]}


def asked(question: str, answer: str) -> list[Row]:
    """What every format of the same question and answer becomes."""
    return [chat(question, answer)]


def marks(rows: Iterable[Row]) -> set[str]:
    """Rows as a set."""
    return {json.dumps(row, sort_keys=True) for row in rows}


# python_docs

PRINT_DOCS = """
import hashlib, json, sys
{first}
from finetune.data.rows import load_rows
from finetune.data.python_docs import question_answer_pairs
from finetune.config.schema import DatasetSettings
rows = question_answer_pairs()
split = load_rows(DatasetSettings(path="python_docs", name=None, split="train", format="auto", text_field="text",
    max_length=None, packing=False, limit=None, eval_fraction=0.1, eval_path=None, test_fraction=0.1, test_path=None,
    split_seed=0))
print(json.dumps([hashlib.sha256(json.dumps(rows).encode()).hexdigest(), split.fingerprint, "torch" in sys.modules]))
"""


def printed_by(script: str, cwd: Path, **environment: str) -> Any:
    """What a fresh interpreter prints, as JSON."""
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", script], env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_python_docs_are_the_same_rows_whatever_the_hash_seed_and_with_torch_imported_or_not(tmp_path: Path) -> None:
    bare = printed_by(PRINT_DOCS.format(first=""), tmp_path, PYTHONHASHSEED="1")
    beside_torch = printed_by(PRINT_DOCS.format(first="import torch"), tmp_path, PYTHONHASHSEED="2")

    assert [bare[2], beside_torch[2]] == [False, True]
    assert bare[:2] == beside_torch[:2]


def test_python_docs_ignore_modules_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.data.python_docs import question_answer_pairs

    before = question_answer_pairs()
    (tmp_path / "heapq.py").write_text("raise SystemExit('a file of the user, not the standard module')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert question_answer_pairs() == before


def test_python_docs_answers_are_unique_short_and_many() -> None:
    from finetune.data.python_docs import LONGEST, SHORTEST, question_answer_pairs

    rows = question_answer_pairs()
    answers = [row["completion"] for row in rows]
    assert len(answers) > 300
    assert len(set(answers)) == len(answers)
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert all(SHORTEST <= len(answer) <= LONGEST for answer in answers)
    assert {"prompt", "completion"} == set().union(*rows)
    assert not any(" at 0x" in answer for answer in answers)  # a memory address would differ from run to run


# Files and formats

TWO_CHATS = [
    {"instruction": "Add 1 and 1.", "output": "2"},
    {"instruction": "Say hello, “politely”.", "output": "Good day,\nhow are you?"},
]


def write_json_list(file: Path, rows: list[Row]) -> Path:
    file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return file


def write_json_lines_with_byte_order_mark(file: Path, rows: list[Row]) -> Path:
    file.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8-sig")
    return file


def write_csv(file: Path, rows: list[Row]) -> Path:
    with open(file, "w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


def write_parquet(file: Path, rows: list[Row]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.jsonl", write_jsonl),
        ("rows.jsonl", write_json_lines_with_byte_order_mark),
        ("rows.json", write_json_list),
        ("rows.json", write_jsonl),
        ("rows.csv", write_csv),
        ("rows.parquet", write_parquet),
    ],
)
def test_reads_the_same_rows_from_every_kind_of_file(
    settings: Settings, tmp_path: Path, name: str, write: Callable[[Path, list[Row]], Path]
) -> None:
    file = write(tmp_path / name, TWO_CHATS)
    expected = [chat(row["instruction"], row["output"]) for row in TWO_CHATS]
    assert load_all_rows("dataset.path", settings(path=str(file))) == expected


def test_reads_chats_from_parquet(settings: Settings, tmp_path: Path) -> None:
    rows = [chat("Hello?", "Yes."), chat("One?", "1", "Two?", "2")]
    file = write_parquet(tmp_path / "rows.parquet", rows)
    assert load_all_rows("dataset.path", settings(path=str(file))) == rows


def test_reads_all_files_of_a_folder_in_the_order_of_their_names(settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    rows = texts(8)
    write_parquet(folder / "d.parquet", rows[6:])
    write_csv(folder / "c.csv", rows[4:6])
    write_jsonl(folder / "a.jsonl", rows[:2])
    write_json_list(folder / "b.json", rows[2:4])
    (folder / "README.md").write_text("no rows in here")
    assert load_all_rows("dataset.path", settings(path=str(folder))) == rows


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("b.jsonl", '{"text": "fine"}\n{"text": 1}\n', "row 2: field 'text' is no text but int"),
        ("b.jsonl", '{"text": "fine"}\n\n{"text": \n', "line 3 is no whole JSON object"),
        ("b.json", '[{"text": "fine"}, {"tekst": "b"}]', "row 2 has no field 'text'; its fields: tekst"),
        ("b.csv", "tekst\nfine\n", "row 1 has no field 'text'; its fields: tekst"),
        ("a.csv", "tekst\nfine\n", "has no such field, and no chat either; its fields: tekst"),
    ],
    ids=["jsonl", "broken_line", "json", "csv", "first_file"],
)
def test_a_bad_row_in_a_folder_is_named_by_its_file_and_its_place_in_it(
    settings: Settings, tmp_path: Path, name: str, content: str, says: str
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", texts(5))
    (folder / name).write_text(content)
    with pytest.raises(ConfigError) as refused:
        load_all_rows("dataset.path", settings(path=str(folder)))
    assert f"dataset.path={folder / name}" in str(refused.value)
    assert says in str(refused.value)


def test_reads_csv_cells_longer_than_the_csv_module_takes_by_default(settings: Settings, tmp_path: Path) -> None:
    rows = [{"text": "word " * 40_000}]
    file = write_csv(tmp_path / "rows.csv", rows)
    assert load_all_rows("dataset.path", settings(path=str(file))) == rows


Q, A = "How many?", "Four."


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "Just text."}, [{"text": "Just text."}]),
        ({"messages": [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]}, asked(Q, A)),
        ({"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]}, asked(Q, A)),
        ({"conversations": [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]}, asked(Q, A)),
        ({"prompt": Q, "completion": A}, asked(Q, A)),
        (
            {"prompt": [{"role": "user", "content": Q}], "completion": [{"role": "assistant", "content": A}]},
            asked(Q, A),
        ),
        ({"instruction": Q, "output": A}, asked(Q, A)),
        ({"instruction": Q, "input": "", "output": A}, asked(Q, A)),
        ({"instruction": Q, "input": "Of five.", "output": A}, asked(f"{Q}\n\nOf five.", A)),
        ({"instruction": Q, "output": A, "text": "both, rendered"}, asked(Q, A)),
    ],
    ids=["text", "messages", "sharegpt", "roles", "prompt", "prompt_lists", "alpaca", "no_input", "input", "both"],
)
def test_finds_out_the_format_by_itself(settings: Settings, tmp_path: Path, row: Row, expected: list[Row]) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [row])
    assert load_all_rows("dataset.path", settings(path=str(file))) == expected


def test_a_named_format_and_text_field_win_over_what_would_be_found_out(settings: Settings, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": Q, "output": A, "body": "Just text."}])
    rows = load_all_rows("dataset.path", settings(path=str(file), format="text", text_field="body"))
    assert rows == [{"text": "Just text."}]


def test_keeps_the_system_turn_and_cuts_what_follows_the_last_answer(settings: Settings, tmp_path: Path) -> None:
    turns = [("system", "Be short."), ("human", Q), ("gpt", A), ("human", "And then?")]
    file = write_jsonl(tmp_path / "rows.jsonl", [{"conversations": [{"from": f, "value": v} for f, v in turns]}])
    [row] = load_all_rows("dataset.path", settings(path=str(file)))
    assert row["messages"] == [{"role": "system", "content": "Be short."}, *chat(Q, A)["messages"]]
    assert first_question(row) == Q


@pytest.mark.parametrize(
    ("good", "empty"),
    [
        ({"text": "Something."}, [{"text": " \n"}, {"text": ""}, {"text": None}]),
        ({"prompt": Q, "completion": A}, [{"prompt": Q, "completion": "  "}, {"prompt": Q, "completion": None}]),
        ({"instruction": Q, "output": A}, [{"instruction": Q, "output": ""}]),
        (chat(Q, A), [chat(Q), {"messages": []}]),
        (chat(Q, A), [chat(Q, ""), chat(Q, " ", "Really?", "\n")]),
        (
            {"prompt": chat(Q)["messages"], "completion": [{"role": "assistant", "content": A}]},
            [{"prompt": chat(Q)["messages"], "completion": []}],
        ),
    ],
    ids=["text", "prompt", "alpaca", "chat_without_answer", "chat_with_empty_answers", "prompt_lists"],
)
def test_drops_and_counts_rows_with_nothing_to_learn(
    settings: Settings, tmp_path: Path, good: Row, empty: list[Row]
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [good, *empty])
    rows = load_rows(settings(path=str(file)))
    assert len(rows.train) == 1
    assert sum(rows.dropped.values()) == len(empty)
    assert rows.counts == {"train": 1, "eval": 0, "test": 0, "dropped": rows.dropped}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "fine"}\n{"text": \n', ["line 2", "no whole JSON object"]),
        ('{"text": "fine"}\n[1]\n', ["line 2", "no JSON object", "one object on each line"]),
        (json.dumps({"text": "fine"}, indent=1), ["line 1", "one object on each line"]),
        (json.dumps([{"text": "fine"}], indent=1), ["line 1", "one object on each line"]),
        ('{"text": "half a pair \\ud83d"}\n', ["line 1", "surrogate"]),
        ('{"body": "fine"}\n', ["dataset.text_field", "body"]),
        ('{"text": 1}\n', ["row 1", "text", "int"]),
        ('{"messages": "none"}\n', ["row 1", "messages"]),
        ('{"messages": [{"role": "user"}]}\n', ["row 1", "content"]),
        ("", ["empty"]),
        ("\n", ["no rows"]),
        ('{"text": ""}\n', ["no rows are left"]),
    ],
)
def test_bad_files_are_refused_in_one_line_that_names_the_file_and_the_place(
    settings: Settings, tmp_path: Path, content: str, words: list[str]
) -> None:
    require_refusal(settings, tmp_path / "rows.jsonl", content, words)


def require_refusal(settings: Settings, file: Path, content: str, words: list[str]) -> None:
    """One line that has the words and the file's path."""
    file.write_text(content)
    with pytest.raises(ConfigError) as refused:
        load_rows(settings(path=str(file)))
    message = str(refused.value)
    assert all(word in message for word in [*words, str(file)])
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (json.dumps({"text": "fine"}, indent=1), ["line 1", "a list of objects, or one object on each line"]),
        ('[{"text": "fine"},\n "text"]', ["row 2 is no JSON object", "a list of objects, or one object on each line"]),
        ('[\n{"text": "a"},\n{"text" "b"}]', ["line 3 is broken JSON"]),
        ('[{"text": "fine"},\n{"text": "half a pair \\ud83d"}]', ["row 2", "surrogate"]),
    ],
    ids=["one_object", "item", "broken", "surrogate"],
)
def test_a_bad_json_file_is_refused_with_what_is_expected_of_it(
    settings: Settings, tmp_path: Path, content: str, words: list[str]
) -> None:
    require_refusal(settings, tmp_path / "rows.json", content, words)


# Splits


def test_splits_by_fraction_into_parts_that_share_no_row(settings: Settings, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", texts(40))
    rows = load_rows(settings(path=str(file), eval_fraction=0.1, test_fraction=0.25))
    assert [len(rows.train), len(rows.evaluation), len(rows.test)] == [26, 4, 10]
    assert marks(rows.train + rows.evaluation + rows.test) == marks(texts(40))
    assert not rows.dropped


def test_held_out_rows_are_fixed_by_split_seed_and_by_nothing_else(settings: Settings, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", texts(60))

    def held_out(**changes: Any) -> tuple[list[Row], list[Row]]:
        rows = load_rows(settings(path=str(file), eval_fraction=0.1, test_fraction=0.1, **changes))
        assert not marks(rows.train) & marks(rows.evaluation + rows.test)
        return rows.evaluation, rows.test

    usual = held_out()
    for changes in ({"limit": 5}, {"limit": None}, {"max_length": 16}, {"packing": True}, {"format": "text"}):
        assert held_out(**changes) == usual
    random.seed(99)
    assert held_out() == usual
    assert held_out(split_seed=1) != usual


def test_the_split_is_independent_of_the_seed_of_the_run(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", texts(30))
    configs = [compose(f"dataset.path={file}", f"seed={seed}", "lora.r=4", "tracker=none") for seed in (0, 7)]
    first, second = (load_rows(config.dataset) for config in configs)
    assert first == second
    assert len(first.evaluation) == 3


def test_limit_cuts_training_rows_only_and_keeps_their_order(settings: Settings, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", texts(40))
    whole = load_rows(settings(path=str(file), eval_fraction=0.25))
    limited = load_rows(settings(path=str(file), eval_fraction=0.25, limit=7))
    assert limited.train == whole.train[:7]
    assert limited.evaluation == whole.evaluation
    assert len(limited.evaluation) == 10


def test_own_files_are_held_out_whole_and_win_over_the_fractions(settings: Settings, tmp_path: Path) -> None:
    paths = {part: write_jsonl(tmp_path / f"{part}.jsonl", texts(6, part)) for part in ("train", "eval", "test")}
    rows = load_rows(
        settings(
            path=str(paths["train"]),
            eval_path=str(paths["eval"]),
            test_path=str(paths["test"]),
            eval_fraction=0.5,
            test_fraction=0.4,
        )
    )
    assert marks(rows.train) == marks(texts(6, "train"))
    assert rows.evaluation == texts(6, "eval")
    assert rows.test == texts(6, "test")


def test_an_own_file_may_have_another_format(settings: Settings, tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [{"instruction": "a", "output": "b"}])
    held = write_csv(tmp_path / "eval.csv", [{"prompt": Q, "completion": A}])
    assert load_rows(settings(path=str(train), eval_path=str(held))).evaluation == asked(Q, A)


def test_held_out_rows_that_also_stand_in_training_are_left_out_and_counted(settings: Settings, tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", texts(6))
    evaluation = write_jsonl(tmp_path / "eval.jsonl", texts(2) + texts(3, "new") + texts(1, "new"))
    test = write_jsonl(tmp_path / "test.jsonl", texts(1) + texts(1, "new") + texts(4, "last"))
    rows = load_rows(settings(path=str(train), eval_path=str(evaluation), test_path=str(test)))
    assert len(rows.train) == 6
    assert rows.evaluation == texts(3, "new")
    assert rows.test == texts(4, "last")
    assert sorted(rows.dropped.values()) == [2, 3]
    assert {name.split()[0] for name in rows.dropped} == {"eval", "test"}


def test_twins_of_training_rows_are_never_held_out_by_a_fraction(settings: Settings, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", texts(30) + texts(15))
    for split_seed in range(5):
        rows = load_rows(settings(path=str(file), eval_fraction=0.3, test_fraction=0.2, split_seed=split_seed))
        train, evaluation, test = marks(rows.train), marks(rows.evaluation), marks(rows.test)
        assert not train & evaluation
        assert not train & test
        assert not evaluation & test
        kept = len(rows.train) + len(rows.evaluation) + len(rows.test)
        assert kept + sum(rows.dropped.values()) == 45


def test_rows_cut_off_by_limit_do_not_come_back_as_held_out(settings: Settings, tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", texts(20))
    evaluation = write_jsonl(tmp_path / "eval.jsonl", texts(20) + texts(2, "new"))
    for limit in (1, 10, None):
        rows = load_rows(settings(path=str(train), eval_path=str(evaluation), limit=limit))
        assert rows.evaluation == texts(2, "new")


def test_test_rows_stay_the_same_whatever_is_held_out_for_evaluation(settings: Settings, tmp_path: Path) -> None:
    file = str(write_jsonl(tmp_path / "rows.jsonl", texts(40)))
    few, many = (load_rows(settings(path=file, eval_fraction=part, test_fraction=0.2)) for part in (0.1, 0.4))
    assert few.test == many.test


def test_a_split_that_leaves_nothing_is_refused_by_its_key(settings: Settings, tmp_path: Path) -> None:
    file = str(write_jsonl(tmp_path / "rows.jsonl", texts(4)))
    with pytest.raises(ConfigError, match=r"dataset\.eval_fraction=0\.01"):
        load_rows(settings(path=file, eval_fraction=0.01))
    with pytest.raises(ConfigError, match=r"dataset\.eval_fraction=0\.5"):
        load_rows(settings(path=file, eval_fraction=0.5, test_fraction=0.49))
    with pytest.raises(ConfigError, match=r"dataset\.eval_path"):
        load_rows(settings(path=file, eval_path=file))


@pytest.mark.parametrize(("limit", "says"), [(1200, ["1,200 of 1,500 rows (dataset.limit)"]), (1500, []), (None, [])])
def test_a_limit_that_cuts_is_said(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture, limit: int | None, says: list[str]
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", texts(2000))
    with caplog.at_level(logging.INFO, "finetune"):
        rows = load_rows(settings(path=str(file), eval_fraction=0.05, test_fraction=0.2, limit=limit))
    assert len(rows.train) == (limit or 1500)
    assert [line for line in caplog.messages if "rows (dataset.limit)" in line] == [
        f"data: training on {words}" for words in says
    ]


# Folders with files named for their part


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("train", "train.jsonl TRAIN.jsonl Train.JSONL my_train.jsonl train-00000-of-00002.parquet data.train.csv"),
        ("train", "train1.json trainData.json 2024-train.json my-training.json en train v2.json"),
        ("eval", "validation.jsonl valid.csv val.json dev.jsonl eval.parquet evaluation.json Validation.jsonl"),
        ("eval", "my_val.jsonl val-00001-of-00002.parquet data.dev.csv EVAL_2.json qa.valid.json mySetVal.json"),
        ("test", "test.jsonl Test.json my-test.csv data.test.csv test_00000.parquet test2.json testSet.json"),
        ("train", "latest.jsonl contest.jsonl attest.json tested.json devices.json evaluated.json value.json"),
        ("train", "invalid.json validated.json trainer.json rows.json 2024.json fastest_rows.csv retrieval.json"),
    ],
)
def test_a_file_is_what_a_whole_word_of_its_name_says(
    settings: Settings, tmp_path: Path, part: str, names: str
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    write_jsonl(folder / "train_rows.jsonl", texts(3))
    for number, name in enumerate(re.findall(r"\S.*?\.(?:jsonl|json|csv|parquet)(?= |$)", names, re.IGNORECASE)):
        write = {".csv": write_csv, ".parquet": write_parquet}.get(Path(name).suffix, write_jsonl)
        write(folder / name, texts(2, f"file {number}"))
        rows = load_rows(settings(path=str(folder)))
        held = {"train": rows.train, "eval": rows.evaluation, "test": rows.test}
        assert marks(texts(2, f"file {number}")) <= marks(held.pop(part)), name
        assert held.pop("train", None) is None or marks(rows.train) == marks(texts(3)), name
        assert not any(held.values()), name
        (folder / name).unlink()


def folder_of(tmp_path: Path, **counts: int) -> Path:
    """A folder of .jsonl files, each with so many rows of its name."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, count in counts.items():
        write_jsonl(folder / f"{name}.jsonl", texts(count, name))
    return folder


@pytest.mark.parametrize(
    ("files", "changes", "sizes", "says"),
    [
        (
            {"train": 10, "validation": 3, "test": 4},
            {"eval_fraction": 0.5, "test_fraction": 0.4},
            {"train": ["train"], "eval": ["validation"], "test": ["test"]},
            "train = train.jsonl; eval = validation.jsonl; test = test.jsonl",
        ),
        (
            {"train": 10, "validation": 3, "test": 4},
            {},
            {"train": ["train"], "eval": ["validation"], "test": ["test"]},
            "train = train.jsonl; eval = validation.jsonl; test = test.jsonl",
        ),
        (
            {"train": 10, "dev": 3},
            {"eval_fraction": 0.5, "test_fraction": 0.2},
            {"train": 8, "eval": ["dev"], "test": 2},
            "train = train.jsonl; eval = dev.jsonl; test = 0.2 of the training rows (dataset.test_fraction)",
        ),
        (
            {"train": 10, "test": 3},
            {"eval_fraction": 0.2, "test_fraction": 0.2},
            {"train": 8, "eval": 2, "test": ["test"]},
            "train = train.jsonl; eval = 0.2 of the training rows (dataset.eval_fraction); test = test.jsonl",
        ),
        (
            {"train_a": 4, "train_b": 6},
            {"eval_fraction": 0.2, "test_fraction": 0.1},
            {"train": 7, "eval": 2, "test": 1},
            "train = train_a.jsonl, train_b.jsonl; eval = 0.2 of the training rows (dataset.eval_fraction); "
            "test = 0.1 of the training rows (dataset.test_fraction)",
        ),
        (
            {"train": 5, "extra": 2, "test": 3},
            {},
            {"train": ["train", "extra"], "eval": [], "test": ["test"]},
            "train = extra.jsonl, train.jsonl (extra.jsonl: no part in the name); test = test.jsonl",
        ),
        (
            {"rows": 5, "test": 3},
            {},
            {"train": ["rows"], "eval": [], "test": ["test"]},
            "train = rows.jsonl; test = test.jsonl",
        ),
        (
            {"train": 5, "val": 3, "dev": 2, "test": 3},
            {"limit": 2},
            {"train": 2, "eval": ["val", "dev"], "test": ["test"]},
            "train = train.jsonl; eval = dev.jsonl, val.jsonl; test = test.jsonl",
        ),
        (
            {f"train-{number}": 1 for number in range(5)} | {"test": 3},
            {},
            {"train": 5, "eval": [], "test": ["test"]},
            "train = train-0.jsonl, train-1.jsonl, train-2.jsonl and 2 more; test = test.jsonl",
        ),
        ({"a": 5, "latest": 3}, {"test_fraction": 0.25}, {"train": 6, "eval": [], "test": 2}, None),
    ],
)
def test_files_of_a_folder_are_the_parts_that_they_are_named_for(
    settings: Settings,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    files: dict[str, int],
    changes: dict[str, Any],
    sizes: dict[str, int | list[str]],
    says: str | None,
) -> None:
    folder = folder_of(tmp_path, **files)
    with caplog.at_level(logging.INFO, "finetune"):
        rows = load_rows(settings(path=str(folder), **changes))
    for name, held in (("train", rows.train), ("eval", rows.evaluation), ("test", rows.test)):
        expected = sizes[name]
        if isinstance(expected, int):
            assert len(held) == expected
        else:
            assert marks(held) == marks(row for file in expected for row in texts(files[file], file))
    assert not marks(rows.train) & marks(rows.evaluation + rows.test)
    assert [line for line in caplog.messages if "train =" in line] == ([f"data: {folder}: {says}"] if says else [])


def test_explicit_files_win_over_files_by_name_which_train_no_less_then(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(tmp_path, train=6, validation=3, test=3, held=2)
    other = write_jsonl(tmp_path / "other.jsonl", texts(4, "other"))
    with caplog.at_level(logging.INFO, "finetune"):
        rows = load_rows(settings(path=str(folder), eval_path=str(other), test_path=str(folder / "held.jsonl")))
    assert marks(rows.train) == marks(texts(6, "train"))
    assert marks(rows.evaluation) == marks(texts(4, "other"))
    assert marks(rows.test) == marks(texts(2, "held"))
    [line] = [line for line in caplog.messages if "train =" in line]
    assert f"eval = dataset.eval_path={other} (not used: validation.jsonl)" in line
    assert f"test = dataset.test_path={folder / 'held.jsonl'} (not used: test.jsonl)" in line


def test_a_folder_given_for_one_part_is_its_files_of_that_name(settings: Settings, tmp_path: Path) -> None:
    folder = str(folder_of(tmp_path, train=6, validation=3, test=2))
    file = str(write_jsonl(tmp_path / "rows.jsonl", texts(9)))
    rows = load_rows(settings(path=file, eval_path=folder, test_path=folder))
    assert marks(rows.evaluation) == marks(texts(3, "validation"))
    assert marks(rows.test) == marks(texts(2, "test"))
    assert load_rows(settings(path=folder, eval_path=folder)).evaluation == rows.evaluation


@pytest.mark.parametrize(
    ("files", "expected", "says"),
    [
        ({"train": 4, "test": 2}, ["test"], "test.jsonl only, named for it, of 2 files"),
        ({"train": 4, "validation": 2}, ["train", "validation"], "all 2 files, as none is named test"),
        ({"test_a": 4, "test_b": 2}, ["test_a", "test_b"], None),
        ({"a": 4, "b": 2}, ["a", "b"], None),
    ],
)
def test_a_folder_to_evaluate_on_is_its_test_files_or_all(
    settings: Settings,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    files: dict[str, int],
    expected: list[str],
    says: str | None,
) -> None:
    folder = folder_of(tmp_path, **files)
    with caplog.at_level(logging.INFO, "finetune"):
        rows = load_all_rows("--data", settings(path=str(folder)))
    assert rows == [row for name in expected for row in texts(files[name], name)]
    assert caplog.messages == ([f"data: --data={folder}: {says}"] if says else [])


@pytest.mark.parametrize(
    ("files", "changes", "says"),
    [
        (
            {"test": 3},
            {},
            "the folder has test.jsonl, and no file to train on; dataset.path={}/test.jsonl trains on it",
        ),
        ({"validation": 3, "test": 3}, {}, "the folder has test.jsonl, validation.jsonl, and no file to train on; "),
        ({"rows": 3}, {"eval_path": "{}/rows.jsonl"}, "the folder has rows.jsonl, and no file to train on; "),
        (
            {"train": 3, "train_test": 3},
            {},
            "train_test.jsonl is named for train and test; give it the name of one part",
        ),
        ({}, {}, "the folder has no .jsonl .json .csv .parquet file"),
    ],
)
def test_a_folder_without_files_to_train_on_or_with_doubtful_names_is_refused(
    settings: Settings, tmp_path: Path, files: dict[str, int], changes: dict[str, str], says: str
) -> None:
    folder = folder_of(tmp_path, **files)
    changes = {key: value.format(folder) for key, value in changes.items()}
    with pytest.raises(ConfigError) as refused:
        load_rows(settings(path=str(folder), **changes))
    assert str(refused.value).startswith(f"dataset.path={folder}: {says.format(folder)}")
    assert "\n" not in str(refused.value)


def test_rows_of_named_files_that_also_stand_in_training_are_left_out_and_counted(
    settings: Settings, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path, train=6)
    write_jsonl(folder / "val.jsonl", texts(2, "train") + texts(3, "new") + [{"text": ""}])
    write_jsonl(folder / "test.jsonl", texts(1, "train") + texts(1, "new") + texts(4, "last") + [{"text": " "}] * 2)
    rows = load_rows(settings(path=str(folder)))
    assert (len(rows.train), rows.evaluation, rows.test) == (6, texts(3, "new"), texts(4, "last"))
    assert sorted(rows.dropped.values()) == [1, 2, 2, 2]

    write_jsonl(folder / "test.jsonl", texts(3, "train"))
    with pytest.raises(ConfigError) as refused:
        load_rows(settings(path=str(folder)))
    assert str(refused.value) == f"dataset.path={folder}: all 3 rows of test.jsonl also stand in training"


def test_a_folders_validation_files_are_held_out_rows_for_the_config_too(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, train=6, validation=3)
    arguments = [f"dataset.path={folder}", "dataset.eval_fraction=0", "dataset.test_fraction=0"]
    assert compose(*arguments, "objective_at=best").objectives == ["eval/loss"]
    assert not compose(*arguments, f"dataset.test_path={folder}/validation.jsonl").objectives
    assert not compose(f"dataset.path={folder}/train.jsonl", *arguments[1:]).objectives


def test_the_fingerprint_changes_with_any_row_of_any_part_and_only_then() -> None:
    def rows() -> Rows:
        return Rows(texts(3), [chat(Q, A)], [chat(Q, "Five.")], {})

    assert rows().fingerprint == rows().fingerprint
    assert rows().fingerprint == dataclasses.replace(rows(), dropped={"some": 3}).fingerprint
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    changed = [
        dataclasses.replace(rows(), train=texts(2)),
        dataclasses.replace(rows(), train=[*texts(2), {"text": "row number 2 "}]),
        dataclasses.replace(rows(), evaluation=[chat(Q, A + A)]),
        dataclasses.replace(rows(), test=[]),
        Rows(texts(3), [chat(Q, "Five.")], [chat(Q, A)], {}),
    ]
    assert len({rows().fingerprint, *(other.fingerprint for other in changed)}) == 6


# Tokens

CHATS = [
    chat("What is 1 + 1?", "2"),
    chat("Say hello.", " Hello,\n\nworld — “ünïcode” ✓ "),
    chat("What does math.gcd do in Python?", "Greatest Common Divisor of two integers, and of many more than two."),
    chat("A long question, " * 12, "A short answer."),
    chat("A short question?", "a long answer " * 20),
    chat(Q, "It ends with <|im_end|> inside."),
]
MANY_TURNS = chat("What is 1 + 1?", "Two.", "And 2 + 2?", "Four!", "Thanks", "You are welcome.")


def trl_tokens(tokenizer: Any, tiny_base: Path, rows: list[Row], max_length: int | None, folder: Path) -> list[Row]:
    """`input_ids` and `labels` as TRL's own SFTTrainer prepares them."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_base),
        args=SFTConfig(str(folder), use_cpu=True, bf16=False, report_to="none", max_length=max_length),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return list(trainer.train_dataset.select_columns(["input_ids", "labels"]))


def by_columns(row: Row) -> Row:
    """A chat as TRL's prompt and completion columns: the last answer is the completion."""
    return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}


@pytest.mark.parametrize("max_length", [None, 64])
def test_chats_become_the_tokens_and_labels_that_trl_makes_of_prompt_and_completion(
    tokenizer: Any, tiny_base: Path, settings: Settings, tmp_path: Path, max_length: int | None
) -> None:
    with_system = {"messages": [{"role": "system", "content": "Be short."}, *chat(Q, A)["messages"]]}
    rows = [*CHATS, with_system]
    theirs = trl_tokens(tokenizer, tiny_base, [by_columns(row) for row in rows], max_length, tmp_path)
    ours = tokenize("train", rows, tokenizer, settings(max_length=max_length)).to_list()
    assert len(ours) == len(rows) - (max_length is not None)  # the long question leaves no room for its answer
    for mine, trls in zip(ours, theirs, strict=True):
        assert mine["input_ids"] == trls["input_ids"]
        assert mine["labels"] == trls["labels"]


@pytest.mark.parametrize("template", ["chatml", "reasoning"])
def test_many_turns_become_trls_tokens_and_their_last_answer_trls_labels(
    tokenizer: Any, tiny_base: Path, settings: Settings, tmp_path: Path, template: str
) -> None:
    if template == "reasoning":
        tokenizer.chat_template = HISTORY_WITHOUT_REASONING
    [theirs] = trl_tokens(tokenizer, tiny_base, [by_columns(MANY_TURNS)], None, tmp_path)
    [ours] = tokenize("train", [MANY_TURNS], tokenizer, settings(max_length=None)).to_list()
    assert ours["input_ids"] == theirs["input_ids"]
    last = next(n for n, label in enumerate(theirs["labels"]) if label != IGNORED)
    assert ours["labels"][last:] == theirs["labels"][last:]


@pytest.mark.parametrize("max_length", [None, 8])
def test_text_becomes_the_tokens_and_labels_that_trl_makes_of_it(
    tokenizer: Any, tiny_base: Path, settings: Settings, tmp_path: Path, max_length: int | None
) -> None:
    rows = [*texts(3), {"text": "ends by itself<|im_end|>"}, {"text": "ünïcode, " * 9}]
    theirs = trl_tokens(tokenizer, tiny_base, rows, max_length, tmp_path)
    ours = tokenize("train", rows, tokenizer, settings(max_length=max_length)).to_list()
    assert ours == theirs
    assert all(row["labels"] == row["input_ids"] for row in ours)


def test_without_a_template_an_answer_follows_its_question_as_trl_has_it(
    tokenizer: Any, tiny_base: Path, settings: Settings, tmp_path: Path
) -> None:
    tokenizer.chat_template = None
    columns = [{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "Name a colour:\n", "completion": "blue"}]
    theirs = trl_tokens(tokenizer, tiny_base, columns, None, tmp_path)
    rows = [chat(row["prompt"], row["completion"]) for row in columns]
    assert tokenize("train", rows, tokenizer, settings()).to_list() == theirs
    with pytest.raises(ConfigError, match=r"model\.chat_template"):
        tokenize("train", [MANY_TURNS], tokenizer, settings())


def labelled(row: Row, tokenizer: Any) -> list[str]:
    """The stretches of text that the loss counts."""
    stretches: list[list[int]] = [[]]
    for label in row["labels"]:
        if label == IGNORED:
            stretches.append([])
        else:
            stretches[-1].append(label)
    return [tokenizer.decode(ids) for ids in stretches if ids]


def test_every_assistant_turn_is_labelled_with_its_end_and_nothing_else(tokenizer: Any, settings: Settings) -> None:
    system = {"messages": [{"role": "system", "content": "Be short."}, *MANY_TURNS["messages"]]}
    for row in tokenize("train", [MANY_TURNS, system], tokenizer, settings()).to_list():
        ends = ["Two.<|im_end|>\n", "Four!<|im_end|>\n", "You are welcome.<|im_end|>\n"]
        assert labelled(row, tokenizer) == ends
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        assert all(label in (token, IGNORED) for token, label in pairs)


def test_where_history_is_rendered_otherwise_the_last_answer_is_labelled_and_no_other_token(
    tokenizer: Any, settings: Settings
) -> None:
    tokenizer.chat_template = HISTORY_WITHOUT_REASONING
    thinking = chat("1 + 1?", "<think>\nOne, one.\n</think>\n\nTwo.", "2 + 2?", "<think>\nTwo, two.\n</think>\n\nFour.")
    plain = chat("1 + 1?", "Two.", "2 + 2?", "Four.")
    # The kept part of the first answer begins as its reasoning does: a common prefix must not be taken for an answer.
    alike = chat("1 + 1?", "<think>\nA.\n</think>\n\n<think less", "2 + 2?", "<think>\nB.\n</think>\n\nFour.")
    rows = tokenize("train", [thinking, plain, alike], tokenizer, settings()).to_list()

    assert "One, one" not in tokenizer.decode(rows[0]["input_ids"])
    assert labelled(rows[0], tokenizer) == ["<think>\nTwo, two.\n</think>\n\nFour.<|im_end|>\n"]
    assert labelled(rows[1], tokenizer) == ["<think>\n\n</think>\n\nFour.<|im_end|>\n"]
    assert labelled(rows[2], tokenizer)[-1] == "<think>\nB.\n</think>\n\nFour.<|im_end|>\n"
    assert all("2 + 2" not in text and "<|im_start|>" not in text for text in labelled(rows[2], tokenizer))


def test_a_question_is_never_labelled_where_the_template_moves_the_system_text(
    tokenizer: Any, settings: Settings
) -> None:
    tokenizer.chat_template = SYSTEM_IN_LAST_QUESTION
    row = {"messages": [{"role": "system", "content": "Be short."}, *chat("2 + 2?", "Four.")["messages"]]}
    [tokens] = tokenize("train", [row], tokenizer, settings()).to_list()
    assert [text.strip() for text in labelled(tokens, tokenizer)] == ["Four.<|im_end|>"]


def test_the_rows_own_end_token_is_learnt_although_it_is_the_padding(tokenizer: Any, settings: Settings) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    for row in tokenize("train", [*CHATS, *texts(2)], tokenizer, settings()).to_list():
        assert tokenizer.eos_token_id in row["labels"][-2:]


def test_max_length_cuts_rows_and_leaves_out_those_without_an_answer_left(tokenizer: Any, settings: Settings) -> None:
    whole = tokenize("train", CHATS, tokenizer, settings(max_length=None)).to_list()
    cut = tokenize("train", CHATS, tokenizer, settings(max_length=40)).to_list()
    assert max(len(row["input_ids"]) for row in whole) > 100
    assert max(len(row["input_ids"]) for row in cut) == 40
    assert cut == [
        {key: ids[:40] for key, ids in row.items()} for row in whole if any(n != IGNORED for n in row["labels"][:40])
    ]
    with pytest.raises(ConfigError, match=r"dataset\.max_length=4"):
        tokenize("train", CHATS, tokenizer, settings(max_length=4))


@pytest.mark.parametrize("packing", [False, True])
def test_rows_left_out_are_counted_and_said_from_the_cache_too(
    tokenizer: Any, settings: Settings, caplog: pytest.LogCaptureFixture, packing: bool
) -> None:
    assert left_out_count(tokenize("train", CHATS, tokenizer, settings(max_length=512, packing=packing))) == 0
    assert "left out" not in caplog.text
    caplog.set_level(logging.INFO)
    counts = []
    for _ in range(2):
        caplog.clear()
        counts.append(left_out_count(tokenize("eval", CHATS, tokenizer, settings(max_length=64, packing=packing))))
        assert "left out 1 eval rows with no answer within dataset.max_length" in caplog.text
    assert counts == [1, 1]  # the long question


def test_no_rows_become_no_tokens(tokenizer: Any, settings: Settings) -> None:
    assert left_out_count(tokenize("test", [], tokenizer, settings())) == 0
    assert len(tokenize("test", [], tokenizer, settings())) == 0
    assert len(tokenize("test", [], tokenizer, settings(packing=True))) == 0


def test_the_same_rows_are_tokenised_once(tokenizer: Any, settings: Settings, tmp_path: Path) -> None:
    from datasets import Dataset

    first = tokenize("train", CHATS, tokenizer, settings()).to_list()
    tokens = tmp_path / "cache" / "tokens"
    [kept] = tokens.iterdir()
    # What the cache holds is changed behind its back: a second call that returns it has not tokenised.
    other = [{"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]}]
    kept.rename(tmp_path / "aside")
    Dataset.from_list(other).save_to_disk(str(kept))
    touched = tokens.stat().st_mtime_ns
    assert tokenize("eval", CHATS, tokenizer, settings()).to_list() == other
    assert tokens.stat().st_mtime_ns == touched  # nor has anything been drawn up beside it
    assert first != other


def test_runs_share_the_rows_as_lists_as_long_as_any_has_them(tokenizer: Any, settings: Settings) -> None:
    tokens = tokenize("train", CHATS, tokenizer, settings())
    rows = as_list(tokens)
    assert rows == tokens.to_list()
    assert as_list(tokens) is rows
    kept = len(_listed)
    del tokens
    assert len(_listed) == kept - 1


def test_the_cache_tells_apart_all_that_changes_tokens(tokenizer: Any, settings: Settings) -> None:
    rows = [*CHATS[:2], *texts(2)]
    usual = tokenize("train", rows, tokenizer, settings()).to_list()
    assert tokenize("train", rows[:3], tokenizer, settings()).to_list() == usual[:3]
    assert tokenize("train", rows, tokenizer, settings(max_length=9)).to_list() != usual
    assert "seq_lengths" in tokenize("train", rows, tokenizer, settings(packing=True)).column_names
    template = tokenizer.chat_template
    tokenizer.chat_template = template.replace("'\n'", "': '")
    assert tokenize("train", rows, tokenizer, settings()).to_list() != usual
    tokenizer.chat_template = template
    assert tokenize("train", rows, tokenizer, settings()).to_list() == usual


def test_the_cache_tells_end_tokens_apart(tokenizer: Any, settings: Settings) -> None:
    tokenize("train", texts(2), tokenizer, settings())
    tokenizer.eos_token = "<|im_start|>"  # the same vocabulary with another end: a base and its chat model
    ends = [row["input_ids"][-1] for row in tokenize("train", texts(2), tokenizer, settings()).to_list()]
    assert ends == [tokenizer.eos_token_id] * 2


RACE = """
import json, sys, time
from pathlib import Path
from transformers import AutoTokenizer
from finetune.config.schema import DatasetSettings
from finetune.data.tokens import tokenize
base, folder, me = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
tokenizer = AutoTokenizer.from_pretrained(base)
settings = DatasetSettings(path="x", name=None, split="train", format="auto", text_field="text", max_length=64,
    packing=False, limit=None, eval_fraction=0, eval_path=None, test_fraction=0, test_path=None, split_seed=0)
lengths = []
for turn in range(8):
    (folder / f"{turn}.{me}").touch()
    while len(list(folder.glob(f"{turn}.*"))) < 2:
        time.sleep(0.0001)
    rows = [{"text": f"turn {turn} row {n}"} for n in range(20)]
    lengths.append(sum(map(len, tokenize("train", rows, tokenizer, settings)["input_ids"])))
print(json.dumps(lengths))
"""


@pytest.mark.slow
def test_two_processes_that_tokenise_the_same_rows_at_once_both_succeed(tiny_base: Path, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    ready.mkdir()
    command = [sys.executable, "-c", RACE, str(tiny_base), str(ready)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    racers = [subprocess.Popen([*command, name], **pipes) for name in ("a", "b")]
    try:
        outputs = [racer.communicate(timeout=240) for racer in racers]
    finally:
        for racer in racers:
            racer.kill()
    assert [racer.returncode for racer in racers] == [0, 0], outputs
    assert json.loads(outputs[0][0]) == json.loads(outputs[1][0])
    left = sorted(folder.name for folder in (tmp_path / "cache" / "tokens").iterdir())
    assert len(left) == 8, left
    assert not any("." in name for name in left)  # no draft is left over


KILLED = """
import os, signal, sys
from pathlib import Path
from finetune.files.atomic import create_folder
with create_folder(Path(sys.argv[1])) as draft:
    (draft / "half").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_drafts_of_killed_processes_are_removed_and_those_of_living_ones_are_not(
    tokenizer: Any, settings: Settings, tmp_path: Path
) -> None:
    tokens = tmp_path / "cache" / "tokens"
    done = subprocess.run([sys.executable, "-c", KILLED, str(tokens / "rows")])
    assert done.returncode == -signal.SIGKILL
    [killed] = tokens.iterdir()
    living, elsewhere = killed.with_suffix(f".{os.getppid()}"), killed.with_name(f"rows.elsewhere{killed.suffix}")
    living.mkdir()
    elsewhere.mkdir()

    tokenize("train", texts(2), tokenizer, settings())

    left = set(tokens.iterdir())
    assert len(left) == 3  # the new tokens are the third
    assert {living, elsewhere} < left


def test_a_draft_becomes_the_folder_at_its_end_or_nothing(tmp_path: Path) -> None:
    place = tmp_path / "cache" / "place"
    with pytest.raises(KeyboardInterrupt), create_folder(place):
        raise KeyboardInterrupt
    assert list(place.parent.iterdir()) == []
    with create_folder(place) as late:
        (late / "late").touch()
        assert not place.exists()
        place.mkdir()
        (place / "first").touch()
    assert [file.name for file in place.parent.rglob("*")] == ["place", "first"]


# Packing


def packed_and_single(rows: list[Row], tokenizer: Any, settings: Settings, length: int) -> tuple[Any, Any]:
    """The tokens of the same rows, several in a sequence and one by one."""
    packed = tokenize("train", rows, tokenizer, settings(packing=True, max_length=length))
    single = tokenize("train", rows, tokenizer, settings(max_length=length))
    assert len(packed) < len(single)
    assert max(len(lengths) for lengths in packed["seq_lengths"]) > 2
    return packed, single


def sharp_model(tiny: Callable[..., RunConfig]) -> Any:
    """The tiny base with weights so large that what a token attends to shows clearly in its loss."""
    import torch

    from finetune.model.loading import load_base
    from finetune.model.source import find_base

    config = tiny("quantization=none")
    model = load_base(find_base(config.model), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.mul_(8)
    return model


@pytest.mark.parametrize("rows", [[*CHATS, MANY_TURNS], texts(12)], ids=["chats", "texts"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_packed_sequences_cost_what_their_rows_cost_alone(
    tiny: Callable[..., RunConfig], tokenizer: Any, settings: Settings, rows: list[Row], batch_size: int
) -> None:
    from finetune.engine.evaluation import evaluate

    model, quantization = sharp_model(tiny), tiny("quantization=none").quantization
    packed, single = packed_and_single(rows, tokenizer, settings, length=256)
    together = evaluate(model, packed, batch_size, quantization)
    alone = evaluate(model, single, batch_size, quantization)
    assert together.tokens == alone.tokens
    assert together.loss * together.tokens == pytest.approx(alone.loss * alone.tokens, rel=1e-4)
    assert together.accuracy == alone.accuracy


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [[*CHATS, MANY_TURNS], texts(12)], ids=["chats", "texts"])
def test_training_on_packed_sequences_takes_each_row_for_itself(
    tiny: Callable[..., RunConfig], tokenizer: Any, settings: Settings, tmp_path: Path, rows: list[Row], attention: str
) -> None:
    import torch

    from finetune.engine.evaluation import evaluate
    from finetune.engine.trl import _Order, _Trainer, training_arguments

    model = sharp_model(tiny)
    model.set_attn_implementation(attention)
    packed, single = packed_and_single(rows, tokenizer, settings, length=256)
    config = tiny("quantization=none", "dataset.packing=true", "dataset.max_length=256")
    trainer = _Trainer(model, training_arguments(config, tmp_path, 1), train_dataset=packed, processing_class=tokenizer)
    trainer.order = _Order([len(ids) for ids in packed["input_ids"]], config)

    total, count = 0.0, 0
    for batch in trainer.get_train_dataloader():
        counted = int((batch["labels"][:, 1:] != IGNORED).sum())
        with torch.no_grad():
            total += trainer.compute_loss(model, dict(batch)).item() * counted
        count += counted
    alone = evaluate(model, single, 1, config.quantization)
    assert count == alone.tokens
    assert total == pytest.approx(alone.loss * alone.tokens, rel=1e-4)


def test_packing_and_not_packing_cost_differently_if_rows_attend_to_each_other(
    tiny: Callable[..., RunConfig], tokenizer: Any, settings: Settings
) -> None:
    """That the two tests above can fail: without boundaries the sum is another one."""
    from datasets import Dataset

    from finetune.engine.evaluation import evaluate

    model, quantization = sharp_model(tiny), tiny("quantization=none").quantization
    packed, single = packed_and_single(CHATS, tokenizer, settings, length=256)
    blurred = Dataset.from_list([{**row, "seq_lengths": [len(row["input_ids"])]} for row in packed])
    alone = evaluate(model, single, 1, quantization)
    assert evaluate(model, blurred, 1, quantization).loss != pytest.approx(alone.loss, rel=1e-3)


# Order

LENGTHS = [random.Random(index).randrange(5, 200) for index in range(103)]


@pytest.mark.parametrize("grouped", [False, True])
def test_an_epoch_visits_each_row_once_and_each_epoch_and_seed_in_another_order(grouped: bool) -> None:
    orders = [epoch_order(LENGTHS, 4, seed, epoch, grouped) for seed in (0, 1, 2**32 - 1) for epoch in (0, 1, 2)]
    assert all(sorted(order) == list(range(103)) for order in orders)
    assert len({tuple(order) for order in orders}) == 9
    assert epoch_order(LENGTHS, 4, 1, 1, grouped) == orders[4]


@pytest.mark.parametrize("grouped", [False, True])
def test_the_order_neither_reads_nor_moves_the_global_random_numbers(grouped: bool) -> None:
    import torch

    torch.manual_seed(1)
    random.seed(1)
    before, python_before = torch.get_rng_state(), random.getstate()
    order = epoch_order(LENGTHS, 4, 0, 0, grouped)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python_before
    torch.manual_seed(2)
    random.seed(2)
    assert epoch_order(LENGTHS, 4, 0, 0, grouped) == order


def test_grouped_by_length_the_longest_batch_comes_first_and_batches_hold_rows_of_like_length() -> None:
    grouped, shuffled = (epoch_order(LENGTHS, 4, 0, 0, group) for group in (True, False))

    def batches(order: list[int]) -> list[list[int]]:
        return [[LENGTHS[row] for row in order[start : start + 4]] for start in range(0, len(order), 4)]

    def padding(order: list[int]) -> int:
        return sum(max(batch) - length for batch in batches(order) for length in batch)

    assert max(LENGTHS) == LENGTHS[grouped[0]]
    assert max(batches(grouped), key=max) == batches(grouped)[0]
    assert padding(grouped) * 3 < padding(shuffled)
