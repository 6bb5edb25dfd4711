"""A data folder: which of its files are training, held-out and test rows."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
from support.bad_input import FILE_TYPES
from support.configs import compose
from support.rows import Settings, marks, texts, write_csv, write_parquet
from support.runs import write_jsonl

from finetune.data.rows import load_all_rows, load_rows
from finetune.errors import ConfigError

pytestmark = pytest.mark.usefixtures("fresh_cache")


@pytest.mark.parametrize(
    ("part", "names"),
    [
        (
            "train",
            "train.jsonl TRAIN.jsonl Train.JSONL my_train.jsonl train-00000-of-00002.parquet data.train.csv",
        ),
        (
            "train",
            "train1.json trainData.json 2024-train.json my-training.json en train v2.json",
        ),
        (
            "eval",
            "validation.jsonl valid.csv val.json dev.jsonl eval.parquet evaluation.json Validation.jsonl",
        ),
        (
            "eval",
            "my_val.jsonl val-00001-of-00002.parquet data.dev.csv EVAL_2.json qa.valid.json mySetVal.json",
        ),
        (
            "test",
            "test.jsonl Test.json my-test.csv data.test.csv test_00000.parquet test2.json testSet.json",
        ),
        (
            "train",
            "latest.jsonl contest.jsonl attest.json tested.json devices.json evaluated.json value.json",
        ),
        (
            "train",
            "invalid.json validated.json trainer.json rows.json 2024.json fastest_rows.csv retrieval.json",
        ),
    ],
)
def test_a_file_is_what_a_whole_word_of_its_name_says(
    settings: Settings, tmp_path: Path, part: str, names: str
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    write_jsonl(folder / "train_rows.jsonl", texts(3))
    for number, name in enumerate(
        re.findall(r"\S.*?\.(?:jsonl|json|csv|parquet)(?= |$)", names, re.IGNORECASE)
    ):
        write = {".csv": write_csv, ".parquet": write_parquet}.get(
            Path(name).suffix, write_jsonl
        )
        write(folder / name, texts(2, f"file {number}"))
        rows = load_rows(settings(path=str(folder)))
        held = {"train": rows.train, "eval": rows.evaluation, "test": rows.test}
        assert marks(texts(2, f"file {number}")) <= marks(held.pop(part)), name
        assert held.pop("train", None) is None or marks(rows.train) == marks(
            texts(3)
        ), name
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
            "train = extra.jsonl, train.jsonl (extra.jsonl: no split in the name); test = test.jsonl",
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
        (
            {"a": 5, "latest": 3},
            {"test_fraction": 0.25},
            {"train": 6, "eval": [], "test": 2},
            None,
        ),
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
    for name, held in (
        ("train", rows.train),
        ("eval", rows.evaluation),
        ("test", rows.test),
    ):
        expected = sizes[name]
        if isinstance(expected, int):
            assert len(held) == expected
        else:
            assert marks(held) == marks(
                row for file in expected for row in texts(files[file], file)
            )
    assert not marks(rows.train) & marks([*rows.evaluation, *rows.test])
    assert [line for line in caplog.messages if "train =" in line] == (
        [f"data: {folder}: {says}"] if says else []
    )


def test_explicit_files_win_over_files_by_name_which_train_no_less_then(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(tmp_path, train=6, validation=3, test=3, held=2)
    other = write_jsonl(tmp_path / "other.jsonl", texts(4, "other"))
    with caplog.at_level(logging.INFO, "finetune"):
        rows = load_rows(
            settings(
                path=str(folder),
                eval_path=str(other),
                test_path=str(folder / "held.jsonl"),
            )
        )
    assert marks(rows.train) == marks(texts(6, "train"))
    assert marks(rows.evaluation) == marks(texts(4, "other"))
    assert marks(rows.test) == marks(texts(2, "held"))
    [line] = [line for line in caplog.messages if "train =" in line]
    assert f"eval = dataset.eval_path={other} (not used: validation.jsonl)" in line
    assert (
        f"test = dataset.test_path={folder / 'held.jsonl'} (not used: test.jsonl)"
        in line
    )


def test_a_folder_given_for_one_part_is_its_files_of_that_name(
    settings: Settings, tmp_path: Path
) -> None:
    folder = str(folder_of(tmp_path, train=6, validation=3, test=2))
    file = str(write_jsonl(tmp_path / "rows.jsonl", texts(9)))
    rows = load_rows(settings(path=file, eval_path=folder, test_path=folder))
    assert marks(rows.evaluation) == marks(texts(3, "validation"))
    assert marks(rows.test) == marks(texts(2, "test"))
    assert (
        load_rows(settings(path=folder, eval_path=folder)).evaluation == rows.evaluation
    )


@pytest.mark.parametrize(
    ("files", "expected", "says"),
    [
        (
            {"train": 4, "test": 2},
            ["test"],
            "test.jsonl only, named for it, of 2 files",
        ),
        (
            {"train": 4, "validation": 2},
            ["train", "validation"],
            "all 2 files, as none is named test",
        ),
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
    *said, format_line = caplog.messages
    assert said == ([f"data: --data={folder}: {says}"] if says else [])
    assert format_line.endswith(": format text (text)")


@pytest.mark.parametrize(
    ("files", "changes", "says"),
    [
        (
            {"test": 3},
            {},
            "the folder has test.jsonl, and no file to train on; dataset.path={}/test.jsonl trains on it",
        ),
        (
            {"validation": 3, "test": 3},
            {},
            "the folder has test.jsonl, validation.jsonl, and no file to train on; ",
        ),
        (
            {"rows": 3},
            {"eval_path": "{}/rows.jsonl"},
            "the folder has rows.jsonl, and no file to train on; ",
        ),
        (
            {"train": 3, "train_test": 3},
            {},
            "train_test.jsonl is named for train and test; give it the name of one split",
        ),
        ({}, {}, f"the folder has no {FILE_TYPES}"),
    ],
)
def test_a_folder_without_files_to_train_on_or_with_doubtful_names_is_refused(
    settings: Settings,
    tmp_path: Path,
    files: dict[str, int],
    changes: dict[str, str],
    says: str,
) -> None:
    folder = folder_of(tmp_path, **files)
    changes = {key: value.format(folder) for key, value in changes.items()}
    with pytest.raises(ConfigError) as refused:
        load_rows(settings(path=str(folder), **changes))
    assert str(refused.value).startswith(
        f"dataset.path={folder}: {says.format(folder)}"
    )
    assert "\n" not in str(refused.value)


def test_rows_of_named_files_that_also_stand_in_training_are_left_out_and_counted(
    settings: Settings, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path, train=6)
    write_jsonl(
        folder / "val.jsonl", texts(2, "train") + texts(3, "new") + [{"text": ""}]
    )
    write_jsonl(
        folder / "test.jsonl",
        texts(1, "train") + texts(1, "new") + texts(4, "last") + [{"text": " "}] * 2,
    )
    rows = load_rows(settings(path=str(folder)))
    assert (len(rows.train), rows.evaluation, rows.test) == (
        6,
        texts(3, "new"),
        texts(4, "last"),
    )
    assert sorted(rows.dropped.values()) == [1, 2, 2, 2]

    write_jsonl(folder / "test.jsonl", texts(3, "train"))
    with pytest.raises(ConfigError) as refused:
        load_rows(settings(path=str(folder)))
    assert (
        str(refused.value)
        == f"dataset.path={folder}: all 3 rows of test.jsonl also stand in training"
    )


def test_a_folders_validation_files_are_held_out_rows_for_the_config_too(
    tmp_path: Path,
) -> None:
    folder = folder_of(tmp_path, train=6, validation=3)
    arguments = [
        f"dataset.path={folder}",
        "dataset.eval_fraction=0",
        "dataset.test_fraction=0",
    ]
    assert compose(*arguments, "objective_at=best").objectives == ["eval/loss"]
    assert not compose(
        *arguments, f"dataset.test_path={folder}/validation.jsonl"
    ).objectives
    assert not compose(f"dataset.path={folder}/train.jsonl", *arguments[1:]).objectives
