"""What W&B gets when a study ends, read back from its offline files; a view's specification, as it
would be sent."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
)
from optuna.trial import create_trial
from support.commands import Station
from support.configs import compose, study_overrides, tiny_overrides
from support.wandb_log import wandb_files, wandb_history, wandb_items, wandb_summary

from finetune.config.sections.tracker import TrackerSettings
from finetune.run.context import RunContext
from finetune.run.load import read_run_config
from finetune.run.run import run
from finetune.tracking.tracker import Label
from finetune.tracking.wandb_finished import add_tag, remove_tag
from sweeps.answer import publish_wandb as module
from sweeps.answer.publish_wandb import PUBLISHED, publish
from sweeps.answer.workspace import build_workspace
from sweeps.study.storage import open_storage
from sweeps.study.study import Study

TEST = {"rows": 3, "winner": 1.25}
SPACE: dict[str, BaseDistribution] = {
    "lora.r": CategoricalDistribution([4, 8]),
    "optimizer.learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
    "optimizer.lr_scheduler_type": CategoricalDistribution(["cosine", "linear"]),
}


def begin(folder: Path, objective: str | list[str], directions: list[str]) -> Study:
    """A study without trials."""
    folder.mkdir()
    begun = optuna.create_study(
        study_name="s", storage=open_storage(None, folder), directions=directions
    )
    begun.set_user_attr("uid", "abc")
    begun.set_user_attr("terms", {"objective": objective})
    (folder / "study.json").write_text(json.dumps({"name": "s", "storage": None}))
    return Study.load(folder)


@pytest.fixture(scope="module")
def ended(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of one trial, which is its winner, with an adapter for W&B from nobody yet."""
    folder = tmp_path_factory.mktemp("studies") / "s"
    study = begin(folder, "eval/loss", ["minimize"])
    overrides = [
        "tracker=wandb",
        "tracker.tags=[mine]",
        "quantization=none",
        "dataset.max_length=64",
    ]
    overrides += ["trainer.max_steps=1", "dataset.test_fraction=0"]
    label = Label("abc-0", "s-0", "s", "trial", folder)
    place = study.folder_of(0).path
    loss = run(
        compose(*tiny_overrides(tiny_base), *overrides),
        place,
        RunContext(label=label, interactive=False),
    )
    assert isinstance(loss, float)
    params = {
        "lora.r": 8,
        "optimizer.learning_rate": 1e-3,
        "optimizer.lr_scheduler_type": "cosine",
    }
    study.optuna.add_trial(create_trial(params=params, distributions=SPACE, value=loss))
    shutil.copytree(place / "adapter", folder / "best" / "adapter")
    return folder


@pytest.fixture
def study(ended: Path, tmp_path: Path) -> Study:
    """A copy of the study, to be published."""
    return Study.load(Path(shutil.copytree(ended, tmp_path / "s")))


@pytest.fixture
def report(tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    path.write_text("<p>What was found</p>")
    return path


def asked(study: Study, **changes: Any) -> TrackerSettings:
    """What a session asks of its tracker."""
    return dataclasses.replace(
        read_run_config(study.folder_of(0).path).tracker, **changes
    )


def winners_run(study: Study) -> list[Any]:
    """The records of the winner's one W&B file."""
    (records,) = wandb_files(study.folder, "abc-0")
    return records


def opened(records: list[Any]) -> Any:
    """A file's run."""
    (run,) = [record.run for record in records if record.HasField("run")]
    return run


def initial_config(records: list[Any]) -> dict[str, Any]:
    """The config of a file's run, but for what W&B adds."""
    config = wandb_items(opened(records).config.update)
    return {name: value for name, value in config.items() if name != "_wandb"}


def lasting_summary(records: list[Any]) -> dict[str, Any]:
    """What a file says of a run, but for the times and steps that W&B itself counts."""
    return {
        name: value
        for name, value in wandb_summary(records).items()
        if not name.startswith("_")
    }


def assert_only_adds(before: list[Any], after: list[Any], added: set[str]) -> None:
    """Check that a file has all that it had before, and besides only some summary values."""
    assert initial_config(after) == initial_config(before)
    assert wandb_history(after) == wandb_history(before)
    summary_before, summary_after = lasting_summary(before), lasting_summary(after)
    assert {
        "status",
        "error",
        "objective",
        "eval/loss",
        "eval/accuracy",
        "train/loss",
    } <= set(summary_before)
    assert {name: summary_after.get(name) for name in summary_before} == summary_before
    assert set(summary_after) - set(summary_before) == added


def artifacts(records: list[Any]) -> dict[str, tuple[str, list[str], dict[str, bytes]]]:
    """By name their type, their aliases, and their files' content."""
    return {
        one.name: (
            one.type,
            sorted(one.aliases),
            {
                file.path: Path(file.local_path).read_bytes()
                for file in one.manifest.contents
            },
        )
        for one in (
            record.artifact for record in records if record.HasField("artifact")
        )
        if one.type != "run_table"
    }


def test_the_winners_run_gets_test_loss_adapter_and_report(
    study: Study, report: Path
) -> None:
    before = winners_run(study)
    assert publish(study, 0, TEST, report, asked(study, adapters="best")) == []

    records = winners_run(study)
    run = opened(records)
    assert (run.run_id, run.run_group, run.job_type) == ("abc-0", "s", "trial")
    assert_only_adds(before, records, {"test/loss"})
    assert wandb_summary(records)["test/loss"] == 1.25
    adapter = {
        file.name: file.read_bytes() for file in study.folder_of(0).adapter.iterdir()
    }
    assert artifacts(records) == {
        "s-adapter": ("model", ["best", "latest"], adapter),
        "s-report": ("report", ["latest"], {"report.html": report.read_bytes()}),
    }
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [
        0
    ]


@pytest.mark.parametrize(
    ("change", "tags", "added"),
    [
        (lambda study: publish(study, 0, TEST, None), ["mine"], {"test/loss"}),
        (lambda study: add_tag(study.folder_of(0), "best"), ["mine", "best"], set()),
        (lambda study: remove_tag(study.folder_of(0), "mine"), [], set()),
    ],
    ids=["publish", "add_tag", "remove_tag"],
)
def test_a_run_that_is_changed_offline_stays_one_whole_file(
    change: Callable[[Study], None], tags: list[str], added: set[str], study: Study
) -> None:
    before = winners_run(study)
    change(study)
    after = winners_run(study)
    assert list(opened(after).tags) == tags
    assert_only_adds(before, after, added)


def test_a_study_sends_its_winner_and_the_one_before_whole(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    better = "hydra.sweeper.start=[{optimizer.learning_rate: 1e-2}]"
    more = (
        "tracker=wandb",
        "tracker.tags=[mine]",
        "hydra.sweeper.n_trials=2",
        "hydra.sweeper.slots=1",
        better,
    )
    space = (
        "~search",
        "optimizer.learning_rate=tag(log,interval(1e-4,1e-1))",
        "hydra/sweeper/pruner=none",
    )
    ended = station.run(*study_overrides(tiny_base, "s1"), *more, *space, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr

    folder = tmp_path / "outputs" / "sweeps" / "s1"
    uid = Study.load(folder).uid
    baseline, winner = (wandb_files(folder, f"{uid}-{number}") for number in (0, 1))
    assert len(baseline) == len(winner) == 1
    assert list(opened(baseline[0]).tags) == ["mine"]
    assert list(opened(winner[0]).tags) == ["mine", "best"]
    assert {"test/loss", "test/accuracy"} <= lasting_summary(winner[0]).keys()
    assert {"test/loss", "test/accuracy"} <= lasting_summary(baseline[0]).keys()
    for records in (*baseline, *winner):
        summary = lasting_summary(records)
        assert summary["status"] == "completed"
        assert isinstance(summary["eval/loss"], float)
        assert wandb_history(records)


def test_the_same_is_not_sent_twice_and_of_what_changes_only_that(
    study: Study, report: Path
) -> None:
    sent = []
    for _ in range(2):
        publish(study, 0, TEST, report, asked(study, adapters="all"))
        sent.append(winners_run(study))
    assert sent[0] == sent[1]

    report.write_text("<p>Another</p>")
    publish(study, 0, TEST, report, asked(study, adapters="all"))
    names = [
        record.artifact.name
        for record in winners_run(study)
        if record.HasField("artifact") and record.artifact.type != "run_table"
    ]
    assert names == ["s-adapter", "s-report", "s-report"]


def test_the_winner_began_with_no_adapter_for_wandb_and_there_may_be_no_test_rows(
    study: Study, tmp_path: Path
) -> None:
    before = winners_run(study)
    assert publish(study, 0, None, tmp_path / "no report.html") == []
    assert winners_run(study) == before
    assert not (study.folder / PUBLISHED).exists()


def test_a_report_stays_on_this_machine_where_trackers_get_no_text(
    study: Study, report: Path
) -> None:
    publish(study, 0, TEST, report, asked(study, adapters="all", text=False))

    assert list(artifacts(winners_run(study))) == ["s-adapter"]
    assert "report" not in json.loads((study.folder / PUBLISHED).read_text())


def test_a_study_without_wandb_is_left_alone(study: Study, report: Path) -> None:
    before = winners_run(study)
    (study.folder_of(0).path / "tracker.json").unlink()
    assert (
        publish(study, 0, TEST, report, asked(study, adapters="all", workspace=True))
        == []
    )
    assert winners_run(study) == before


def test_a_failure_is_one_warning_and_the_next_session_tries_again(
    study: Study,
    report: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = winners_run(study)
    with monkeypatch.context() as broken:
        broken.setenv("WANDB_DATA_DIR", f"{os.devnull}/nowhere")
        assert publish(study, 0, TEST, report) == []
    (line,) = [
        record.message for record in caplog.records if record.name == module.__name__
    ]
    assert line.startswith("W&B: ")
    assert line.endswith("; not uploaded: report, test/loss")
    assert winners_run(study) == before

    publish(study, 0, TEST, report)
    assert list(artifacts(winners_run(study))) == ["s-report"]


def test_offline_no_view_is_saved_and_that_is_said(study: Study) -> None:
    before = winners_run(study)
    (line,) = publish(study, 0, None, None, asked(study, workspace=True))
    assert "not saved" in line
    assert winners_run(study) == before


@pytest.fixture
def server(study: Study, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The views that would have been sent to W&B, were the study's runs online."""
    from wandb_workspaces.workspaces import interface

    opened = study.folder_of(0).path / "tracker.json"
    opened.write_text(json.dumps({**json.loads(opened.read_text()), "mode": "online"}))
    sent: list[Any] = []

    def add_to_run(_: Any, add: Callable[[Any], Any], **__: Any) -> Any:
        return add(SimpleNamespace(entity="me", project="mine", summary={}))

    def upsert(view: Any) -> dict[str, Any]:
        sent.append(view)
        return {"upsertView": {"view": {"name": "nw-name-v", "id": "id"}}}

    monkeypatch.setattr(module, "add_to_run", add_to_run)
    monkeypatch.setattr(interface.internal, "upsert_view2", upsert)
    monkeypatch.setattr(interface.wandb, "Api", lambda: None)
    monkeypatch.setattr(interface, "get_app_url", lambda _: "https://wandb.ai")
    return sent


def test_online_the_view_is_saved_once_and_its_address_said_each_time(
    study: Study, server: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        (line,) = publish(study, 0, TEST, None, asked(study, workspace=True))
        assert line == "W&B workspace: https://wandb.ai/me/mine?nw=name"
    assert [(view.entity, view.project, view.display_name) for view in server] == [
        ("me", "mine", "Study s")
    ]
    assert capsys.readouterr().err == ""

    assert publish(study, 0, TEST, None, asked(study)) == []


def test_a_view_that_can_not_be_saved_is_a_warning(
    study: Study,
    server: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuses(*_: Any) -> None:
        raise ConnectionError("no such project")

    monkeypatch.setattr(module, "save_workspace", refuses)
    assert publish(study, 0, TEST, None, asked(study, workspace=True)) == []
    assert [
        record.message for record in caplog.records if record.name == module.__name__
    ] == ["W&B: no such project; not uploaded: test/loss, workspace"]


def sent(study: Study) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """A view's specification as W&B is sent it: its runs' part, and its panels by kind."""
    view = build_workspace(study, "me", "mine")._to_model()
    section = json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True))[
        "section"
    ]
    panels: dict[str, list[dict[str, Any]]] = {}
    for part in section["panelBankConfig"]["sections"]:
        for panel in part["panels"]:
            panels.setdefault(panel["viewType"], []).append(panel["config"])
    return section["runSets"][0], panels


def test_the_view_has_the_studys_trials_by_what_was_searched(study: Study) -> None:
    runs, panels = sent(study)

    filters = [
        (one["key"]["name"], one["op"], one["value"])
        for one in runs["filters"]["filters"]
    ]
    assert filters == [
        ("group", "=", "s"),
        ("jobType", "=", "trial"),
    ]  # a confirmation's runs are none of its trials
    assert runs["sort"]["keys"] == [
        {"key": {"section": "summary", "name": "objective"}, "ascending": True}
    ]
    assert list(runs["runFeed"]["columnPinned"]) == [
        "run:displayName",
        "run:state",
        "summary:objective",
        "config:lora.value.r",
        "config:optimizer.value.learning_rate",
        "config:optimizer.value.lr_scheduler_type",
    ]
    (coordinates,) = panels["Parallel Coordinates Plot"]
    assert [
        (column["accessor"], column.get("log", False))
        for column in coordinates["columns"]
    ] == [
        ("config:lora.value.r", False),
        ("config:optimizer.value.learning_rate", True),
        ("config:optimizer.value.lr_scheduler_type", False),
        ("summary:objective", False),
    ]
    assert [panel["targetKey"] for panel in panels["Parameter Importance"]] == [
        "objective"
    ]
    assert [
        (panel["xAxis"], panel["yAxis"], panel.get("xAxisLogScale"))
        for panel in panels["Scatter Plot"]
    ] == [
        ("config:lora.value.r", "summary:objective", None),
        ("config:optimizer.value.learning_rate", "summary:objective", True),
    ]
    assert [panel["metrics"] for panel in panels["Run History Line Plot"]] == [
        ["eval/loss"],
        ["train/loss"],
    ]
    assert panels["Run Comparer"] == [{"diffOnly": "split"}]


def test_a_group_that_is_searched_stands_as_its_keys_and_each_objective_has_its_panels(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    study = begin(
        tmp_path / "s",
        ["eval/accuracy", "adapter/parameters"],
        ["maximize", "minimize"],
    )
    space = {
        "lora/target": CategoricalDistribution(["q_v", "attention"]),
        "own": FloatDistribution(0, 1),
    }
    for number, target in enumerate(["q_v", "attention"]):
        values = {
            "params": {"lora/target": target, "own": 0.5},
            "values": [0.5, 100 + number],
        }
        study.optuna.add_trial(create_trial(distributions=space, **values))
        place = study.folder_of(number).path
        place.mkdir(parents=True)
        config = tiny(f"lora/target={target}").to_dict()
        (place / "run.json").write_text(json.dumps({"config": config}))
    runs, panels = sent(study)

    accessors = [
        column["accessor"]
        for column in panels["Parallel Coordinates Plot"][0]["columns"]
    ]
    assert accessors == [
        "config:lora.value.target_modules",
        "summary:eval/accuracy",
        "summary:adapter/parameters",
    ]
    assert [panel["targetKey"] for panel in panels["Parameter Importance"]] == [
        "eval/accuracy",
        "adapter/parameters",
    ]
    assert runs["sort"]["keys"][0]["ascending"] is False
    curves = [panel["metrics"] for panel in panels["Run History Line Plot"]]
    assert curves == [["eval/loss"], ["eval/accuracy"], ["train/loss"]]
    assert "Scatter Plot" not in panels
