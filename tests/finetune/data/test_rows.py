"""Which rows a run trains on and holds out: fractions, own files, duplicates, limits, the
fingerprint."""

import logging
import random
from pathlib import Path
from typing import Any

import pytest
from support.configs import compose
from support.models import Row
from support.rows import A, Q, Settings, asked, chat, marks, texts, write_csv
from support.runs import write_jsonl

from finetune.data.rows import Rows, load_rows
from finetune.data.types import fingerprint
from finetune.errors import ConfigError

pytestmark = pytest.mark.usefixtures("fresh_cache")


def test_splits_by_fraction_into_parts_that_share_no_row(
    settings: Settings, tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", texts(40))
    rows = load_rows(settings(path=str(file), eval_fraction=0.1, test_fraction=0.25))
    assert [len(rows.train), len(rows.evaluation), len(rows.test)] == [26, 4, 10]
    assert marks([*rows.train, *rows.evaluation, *rows.test]) == marks(texts(40))
    assert not rows.dropped


def test_held_out_rows_are_fixed_by_split_seed_and_by_nothing_else(
    settings: Settings, tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", texts(60))

    def held_out(**changes: Any) -> tuple[list[Row], list[Row]]:
        rows = load_rows(
            settings(path=str(file), eval_fraction=0.1, test_fraction=0.1, **changes)
        )
        assert not marks(rows.train) & marks([*rows.evaluation, *rows.test])
        return rows.evaluation, rows.test

    usual = held_out()
    for changes in (
        {"limit": 5},
        {"limit": None},
        {"max_length": 16},
        {"packing": True},
        {"format": "text"},
    ):
        assert held_out(**changes) == usual
    random.seed(99)
    assert held_out() == usual
    assert held_out(split_seed=1) != usual


def test_the_split_is_independent_of_the_seed_of_the_run(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", texts(30))
    configs = [
        compose(f"dataset.path={file}", f"seed={seed}", "lora.r=4", "tracker=none")
        for seed in (0, 7)
    ]
    first, second = (load_rows(config.dataset) for config in configs)
    assert first == second
    assert len(first.evaluation) == 3


def test_limit_cuts_training_rows_only_and_keeps_their_order(
    settings: Settings, tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", texts(40))
    whole = load_rows(settings(path=str(file), eval_fraction=0.25))
    limited = load_rows(settings(path=str(file), eval_fraction=0.25, limit=7))
    assert limited.train == whole.train[:7]
    assert limited.evaluation == whole.evaluation
    assert len(limited.evaluation) == 10


def test_own_files_are_held_out_whole_and_win_over_the_fractions(
    settings: Settings, tmp_path: Path
) -> None:
    paths = {
        part: write_jsonl(tmp_path / f"{part}.jsonl", texts(6, part))
        for part in ("train", "eval", "test")
    }
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


def test_an_own_file_may_have_another_format(
    settings: Settings, tmp_path: Path
) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [{"instruction": "a", "output": "b"}])
    held = write_csv(tmp_path / "eval.csv", [{"prompt": Q, "completion": A}])
    assert load_rows(
        settings(path=str(train), eval_path=str(held))
    ).evaluation == asked(Q, A)


def test_held_out_rows_that_also_stand_in_training_are_left_out_and_counted(
    settings: Settings, tmp_path: Path
) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", texts(6))
    evaluation = write_jsonl(
        tmp_path / "eval.jsonl", texts(2) + texts(3, "new") + texts(1, "new")
    )
    test = write_jsonl(
        tmp_path / "test.jsonl", texts(1) + texts(1, "new") + texts(4, "last")
    )
    rows = load_rows(
        settings(path=str(train), eval_path=str(evaluation), test_path=str(test))
    )
    assert len(rows.train) == 6
    assert rows.evaluation == texts(3, "new")
    assert rows.test == texts(4, "last")
    assert sorted(rows.dropped.values()) == [2, 3]
    assert {name.split()[0] for name in rows.dropped} == {"eval", "test"}


def test_twins_of_training_rows_are_never_held_out_by_a_fraction(
    settings: Settings, tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", texts(30) + texts(15))
    for split_seed in range(5):
        rows = load_rows(
            settings(
                path=str(file),
                eval_fraction=0.3,
                test_fraction=0.2,
                split_seed=split_seed,
            )
        )
        train, evaluation, test = (
            marks(rows.train),
            marks(rows.evaluation),
            marks(rows.test),
        )
        assert not train & evaluation
        assert not train & test
        assert not evaluation & test
        kept = len(rows.train) + len(rows.evaluation) + len(rows.test)
        assert kept + sum(rows.dropped.values()) == 45


def test_rows_cut_off_by_limit_do_not_come_back_as_held_out(
    settings: Settings, tmp_path: Path
) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", texts(20))
    evaluation = write_jsonl(tmp_path / "eval.jsonl", texts(20) + texts(2, "new"))
    for limit in (1, 10, None):
        rows = load_rows(
            settings(path=str(train), eval_path=str(evaluation), limit=limit)
        )
        assert rows.evaluation == texts(2, "new")


def test_test_rows_stay_the_same_whatever_is_held_out_for_evaluation(
    settings: Settings, tmp_path: Path
) -> None:
    file = str(write_jsonl(tmp_path / "rows.jsonl", texts(40)))
    few, many = (
        load_rows(settings(path=file, eval_fraction=part, test_fraction=0.2))
        for part in (0.1, 0.4)
    )
    assert few.test == many.test


def test_a_split_that_leaves_nothing_is_refused_by_its_key(
    settings: Settings, tmp_path: Path
) -> None:
    file = str(write_jsonl(tmp_path / "rows.jsonl", texts(4)))
    with pytest.raises(ConfigError, match=r"dataset\.eval_fraction=0\.01"):
        load_rows(settings(path=file, eval_fraction=0.01))
    with pytest.raises(ConfigError, match=r"dataset\.eval_fraction=0\.5"):
        load_rows(settings(path=file, eval_fraction=0.5, test_fraction=0.49))
    with pytest.raises(ConfigError, match=r"dataset\.eval_path"):
        load_rows(settings(path=file, eval_path=file))


@pytest.mark.parametrize(
    ("limit", "says"),
    [(1200, ["1,200 of 1,500 rows (dataset.limit)"]), (1500, []), (None, [])],
)
def test_a_limit_that_cuts_is_said(
    settings: Settings,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    limit: int | None,
    says: list[str],
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", texts(2000))
    with caplog.at_level(logging.INFO, "finetune"):
        rows = load_rows(
            settings(path=str(file), eval_fraction=0.05, test_fraction=0.2, limit=limit)
        )
    assert len(rows.train) == (limit or 1500)
    assert [line for line in caplog.messages if "rows (dataset.limit)" in line] == [
        f"data: training on {words}" for words in says
    ]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ((), "dataset.limit=240, the default of python_docs; null: all rows"),
        (("dataset.limit=100",), "dataset.limit"),
    ],
)
def test_a_limit_that_the_user_has_not_set_is_explained(
    overrides: tuple[str, ...], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "finetune"):
        rows = load_rows(compose(*overrides).dataset)
    (line,) = [line for line in caplog.messages if line.startswith("data: training on")]
    assert line.startswith(f"data: training on {len(rows.train)} of ")
    assert line.endswith(f" rows ({says})")


def test_the_fingerprint_changes_with_any_row_of_any_split_and_only_then(
    settings: Settings, tmp_path: Path
) -> None:
    def load(**changed: list[dict[str, Any]]) -> Rows:
        splits = {"train": texts(3), "eval": [chat(Q, A)], "test": [chat(Q, "Five.")]}
        paths = {}
        for split, split_rows in {**splits, **changed}.items():
            key = "path" if split == "train" else f"{split}_path"
            paths[key] = str(write_jsonl(tmp_path / f"{split}.jsonl", split_rows))
        return load_rows(settings(**paths))

    rows = load()
    splits = [list(rows.train), list(rows.evaluation), list(rows.test)]
    assert rows.fingerprint == fingerprint(splits)
    assert load().fingerprint == rows.fingerprint
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    changed = [
        load(train=texts(2)),
        load(train=[*texts(2), {"text": "row number 2 "}]),
        load(eval=[chat(Q, A + A)]),
        load(eval=[chat(Q, "Five.")], test=[chat(Q, A)]),
    ]
    assert len({rows.fingerprint, *(other.fingerprint for other in changed)}) == 5
