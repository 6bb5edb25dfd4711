"""The packaged data set: questions and answers from the interpreter's docstrings."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.configs import compose
from support.runs import write_jsonl

pytestmark = pytest.mark.usefixtures("fresh_cache")

PRINT_DOCS = """
import hashlib, json, sys
{first}
from finetune.data.rows import load_rows
from finetune.data.python_docs import question_answer_pairs
from finetune.config.sections.dataset import DatasetSettings
rows = question_answer_pairs()
split = load_rows(DatasetSettings(path="python_docs", name=None, split="train", format="auto", text_field="text",
    max_length=None, packing=False, limit=None, eval_fraction=0.1, eval_path=None, test_fraction=0.1, test_path=None,
    split_seed=0))
print(json.dumps([hashlib.sha256(json.dumps(rows).encode()).hexdigest(), split.fingerprint, "torch" in sys.modules]))
"""


def printed_by(script: str, cwd: Path, **environment: str) -> Any:
    """What a fresh interpreter prints, as JSON."""
    env = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_python_docs_are_the_same_rows_whatever_the_hash_seed_and_with_torch_imported_or_not(
    tmp_path: Path,
) -> None:
    bare = printed_by(PRINT_DOCS.format(first=""), tmp_path, PYTHONHASHSEED="1")
    beside_torch = printed_by(
        PRINT_DOCS.format(first="import torch"), tmp_path, PYTHONHASHSEED="2"
    )

    assert [bare[2], beside_torch[2]] == [False, True]
    assert bare[:2] == beside_torch[:2]


def test_python_docs_ignore_modules_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.data.python_docs import question_answer_pairs

    before = question_answer_pairs()
    (tmp_path / "heapq.py").write_text(
        "raise SystemExit('a file of the user, not the standard module')"
    )
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
    assert {"prompt", "completion", "family"} == set().union(*rows)
    assert not any(
        " at 0x" in answer for answer in answers
    )  # a memory address would differ from run to run


def test_variations_of_one_docstring_stay_in_one_part() -> None:
    from finetune.data.rows import load_rows

    rows = load_rows(compose().dataset)

    part_of: dict[str, str] = {}
    words_of: dict[str, set[str]] = {}
    for part, rows_of_part in rows.by_split.items():
        for row in rows_of_part:
            question, answer = [message["content"] for message in row["messages"]]
            name = question.split()[2]
            part_of[name] = part
            words_of[name] = set(answer.lower().split())
    for family in (
        ["math.sin", "math.cos", "math.tan", "cmath.asinh"],
        ["os.path.getatime", "os.path.getctime", "os.path.getsize"],
        ["uuid.uuid3", "uuid.uuid5"],
        ["base64.encode", "base64.decode"],
    ):
        members = part_of.keys() & {*family}
        assert len({part_of[name] for name in members}) <= 1, family
    for name, other in itertools.combinations(part_of, 2):
        if part_of[name] != part_of[other]:
            common = words_of[name] & words_of[other]
            either = words_of[name] | words_of[other]
            assert len(common) < 0.6 * len(either), (name, other)


def test_rows_of_python_docs_are_groups_however_they_are_named(tmp_path: Path) -> None:
    from finetune.data.rows import load_rows

    mine = write_jsonl(
        tmp_path / "mine.jsonl", [{"text": f"Row {n}."} for n in range(30)]
    )
    mixed = load_rows(
        compose("dataset=local", f"dataset.path=[python_docs,{mine}]").dataset
    )
    alone = load_rows(compose("dataset=local", "dataset.path=python_docs").dataset)

    for rows in (mixed, alone):
        (note,) = [line for line in rows.notes if "stay in one part" in line]
        assert "in 54 groups" in note
        assert not any("family" in line for line in [*rows.notes, *rows.formats])
        assert all("family" not in row for row in rows.test)


def test_python_docs_are_collected_once_in_a_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from finetune.data import sources
    from finetune.data.rows import load_rows

    collected: list[None] = []

    def collect() -> list[dict[str, str]]:
        collected.append(None)
        return [
            {"prompt": f"{n}?", "completion": f"{n}.", "family": str(n)}
            for n in range(20)
        ]

    monkeypatch.setattr(sources, "question_answer_pairs", collect)
    sources.python_docs.cache_clear()
    try:
        settings = compose().dataset
        assert load_rows(settings) == load_rows(settings)
    finally:
        sources.python_docs.cache_clear()
    assert len(collected) == 1
