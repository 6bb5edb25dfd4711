"""Several sources in `dataset.path`, with weights."""

import dataclasses
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.configs import compose
from support.rows import Settings, chat, marks, texts, write_csv
from support.runs import write_jsonl

from finetune.config.schema import RunConfig
from finetune.config.sections.dataset import SourceSettings
from finetune.data.rows import load_all_rows, load_rows
from finetune.errors import ConfigError
from finetune.run.identity import run_identity

pytestmark = pytest.mark.usefixtures("fresh_cache")


def write_sources(folder: Path, **counts: int) -> dict[str, str]:
    return {
        name: str(write_jsonl(folder / f"{name}.jsonl", texts(count, name)))
        for name, count in counts.items()
    }


def test_a_list_of_one_source_equals_its_text(
    settings: Settings, tmp_path: Path
) -> None:
    path = write_sources(tmp_path, a=40)["a"]
    fractions = {"eval_fraction": 0.1, "test_fraction": 0.2}
    text = load_rows(settings(path=path, **fractions))
    assert load_rows(settings(path=[path], **fractions)) == text
    assert load_rows(settings(path=[SourceSettings(path=path)], **fractions)) == text
    config = compose(f"dataset.path={path}")
    for spelling in (
        f"[{path}]",
        f"[{{path:{path}}}]",
        f"[{{path:{path},weight:1.0}}]",
    ):
        assert compose(f"dataset.path={spelling}") == config
    assert config.to_dict()["dataset"]["path"] == path


def test_weights_say_how_often_training_rows_come(
    settings: Settings, tmp_path: Path
) -> None:
    paths = write_sources(tmp_path, a=40, b=60, c=20)
    path = [
        paths["a"],
        SourceSettings(path=paths["b"], weight=2.5),
        SourceSettings(path=paths["c"], weight=0.5),
    ]
    rows = load_rows(settings(path=path, eval_fraction=0.1, test_fraction=0.15))
    assert (len(rows.evaluation), len(rows.test)) == (12, 18)
    held_out = marks([*rows.evaluation, *rows.test])
    assert len(held_out) == 30
    assert not held_out & marks(rows.train)
    unweighted = load_rows(
        settings(path=list(paths.values()), eval_fraction=0.1, test_fraction=0.15)
    )
    assert (unweighted.evaluation, unweighted.test) == (rows.evaluation, rows.test)
    times = Counter((row.source, row.number) for row in rows.train)
    in_training = Counter(row.source for row in unweighted.train)
    assert Counter(
        times[row.source, row.number]
        for row in unweighted.train
        if row.source == paths["a"]
    ) == {1: in_training[paths["a"]]}
    half_b = round(in_training[paths["b"]] / 2)
    assert Counter(
        times[row.source, row.number]
        for row in unweighted.train
        if row.source == paths["b"]
    ) == {
        2: in_training[paths["b"]] - half_b,
        3: half_b,
    }
    assert sum(row.source == paths["c"] for row in rows.train) == round(
        in_training[paths["c"]] / 2
    )


def test_drawn_rows_depend_on_split_seed_alone(
    settings: Settings, tmp_path: Path
) -> None:
    paths = write_sources(tmp_path, a=30, b=30)
    path = [paths["a"], SourceSettings(path=paths["b"], weight=0.5)]

    def drawn(**changes: Any) -> set[str]:
        return marks(
            row
            for row in load_rows(settings(path=path, **changes)).train
            if row.source == paths["b"]
        )

    assert len(drawn()) == 15
    assert drawn() == drawn(max_length=16)
    assert drawn() != drawn(split_seed=1)


def test_a_limit_takes_of_each_source_its_share(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = write_sources(tmp_path, a=200, b=100)
    path = [paths["a"], SourceSettings(path=paths["b"], weight=2)]
    with caplog.at_level(logging.INFO, "finetune"):
        rows = load_rows(settings(path=path, limit=100))
    assert len(rows.train) == 100
    assert 30 < sum(row.source == paths["b"] for row in rows.train) < 70
    assert rows.notes == [
        f"training rows by weight: 200 from 200 of {paths['a']} (1), 200 from 100 of {paths['b']} (2)",
        "training on 100 of 400 rows (dataset.limit)",
    ]
    said = [f"data: {line}" for line in [*rows.formats, *rows.notes]]
    assert said == caplog.messages


def test_each_source_has_its_format_and_its_split_files(
    settings: Settings, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", texts(5))
    write_jsonl(folder / "validation.jsonl", texts(2, "held"))
    table = str(
        write_csv(tmp_path / "t.csv", [{"prompt": "Who?", "completion": "Ana."}])
    )
    alpaca = str(
        write_jsonl(
            tmp_path / "c.jsonl", [{"instruction": "Where?", "output": "Here."}]
        )
    )
    data = settings(path=[str(folder), table, alpaca], eval_fraction=0.5)
    rows = load_rows(data)
    assert marks(rows.train) == marks(
        [*texts(5), chat("Who?", "Ana."), chat("Where?", "Here.")]
    )
    assert rows.evaluation == texts(2, "held")
    assert data.holds_out
    assert len(load_all_rows("--data", data)) == 9
    assert settings(path=[table, str(folder)]).holds_out
    assert not settings(path=[table, alpaca]).holds_out


def test_a_mixture_on_the_command_line_and_back_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_sources(tmp_path, a=3, b=3)
    config = compose(
        "dataset.path=[a.jsonl,{path: b.jsonl,weight: 2},python_docs,owner/name]"
    )
    assert [source.weight for source in config.dataset.sources] == [1, 2, 1, 1]
    assert config.dataset.limit is None
    assert RunConfig.from_dict(config.to_dict()) == config
    recorded = run_identity(config, None, None)["config"]["dataset"]["path"]
    assert recorded == [
        str(tmp_path / "a.jsonl"),
        {"path": str(tmp_path / "b.jsonl"), "weight": 2.0},
        "python_docs",
        "owner/name",
    ]
    assert compose("dataset.path=[python_docs]").dataset.limit == 240
    assert (
        compose("dataset.path=python_docs").to_dict()["dataset"]["path"]
        == "python_docs"
    )
    assert dataclasses.asdict(config.dataset)["path"][1] == {
        "path": "b.jsonl",
        "weight": 2.0,
    }


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("[]", "dataset.path=[]: must be a hub id, a file, a folder, or python_docs"),
        ("['']", "dataset.path=: must be a hub id, a file, a folder, or python_docs"),
        ("[a,'']", "dataset.path[1]=: must be a hub id, a file, a folder, or python_docs"),
        ("[a,b,a]", "dataset.path[2]=a: stands twice; {path: a, weight: 2} repeats its rows"),
        ("[a,{path:b,weight:0}]", "dataset.path[1].weight=0: must be a number above 0, at most 1000"),
        ("[{path:b,weight:-1}]", "dataset.path[0].weight=-1: must be a number above 0, at most 1000"),
        ("[{path:b,weight:1e6}]", "dataset.path[0].weight=1e+06: must be a number above 0, at most 1000"),
        ("[{path:b,weight:inf}]", "dataset.path[0].weight=inf: must be a number"),
        ("[{path:b,weight:nan}]", "dataset.path[0].weight=nan: must be a number"),
        ("[{path:b,weight:true}]", "dataset.path[0].weight=true: must be a number"),
        ("[{path:b,weight:two}]", "dataset.path[0].weight=two: must be a number"),
        ("[{path:b,wieght:2}]", "dataset.path[0].wieght: no such key; did you mean weight? allowed: path, weight"),
        ("[{weight:2}]", "dataset.path[0].path: must be given"),
        ("[{path:[b],weight:2}]", "dataset.path[0].path=['b']: must be text"),
        ("[[a,b]]", "dataset.path[0]=['a', 'b']: must be text or {path: …, weight: …}"),
        ("[a,null]", "dataset.path[1]=null: must be text or {path: …, weight: …}"),
        ("null", "dataset.path=null: must be text or a list, each item text or {path: …, weight: …}"),
        ("{path:b}", "dataset.path={'path': 'b'}: must be text or a list, each item text or {path: …, weight: …}"),
    ],
)  # fmt: skip
def test_a_bad_list_is_refused_in_one_line(path: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose(f"dataset.path={path}")
    assert str(refused.value) == says


def test_a_weight_that_takes_no_row_is_refused(
    settings: Settings, tmp_path: Path
) -> None:
    paths = write_sources(tmp_path, a=8, b=8)
    path = [paths["a"], SourceSettings(path=paths["b"], weight=0.01)]
    with pytest.raises(
        ConfigError, match=r"b\.jsonl: weight 0\.01 takes none of its 8 training"
    ):
        load_rows(settings(path=path))
