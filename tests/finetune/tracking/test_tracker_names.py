"""Names of metrics, config keys and projects that trackers refuse, or take for something else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.wandb_log import wandb_files, wandb_history, wandb_items, wandb_summary

from finetune.config.schema import RunConfig
from finetune.errors import ConfigError
from finetune.files.run_folder import RunFolder
from finetune.tracking.open import check_trackers
from finetune.tracking.tensorboard import TensorboardTracker
from finetune.tracking.tracker import Label, SeveralTrackers
from finetune.tracking.trackio import TrackioTracker
from finetune.tracking.wandb import WandbTracker
from finetune.tracking.wandb_artifacts import artifact_name

Tiny = Callable[..., RunConfig]

NAMES = (
    "eval/recall@5",
    "eval/recall(5)",
    "eval/faq (new)/loss",
    "eval/faq.v2/loss",
    "eval/50 %",
    "eval/a*b",
    "eval/a*",
    "eval/a\\b",
    "eval//é",
    f"eval/{'n' * 300}",
)

KEY = "^m.*(q|v)_proj$"


@pytest.fixture
def config(tiny: Tiny) -> RunConfig:
    values = tiny("tracker=wandb").to_dict()
    values["lora"]["extra"]["rank_pattern"] = {KEY: 4}
    return RunConfig.from_dict(values)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    return folder


def log_all(tracker: Any) -> None:
    for step, value in enumerate((3.0, 1.0, 2.0), start=1):
        tracker.log(step, dict.fromkeys(NAMES, value))
    tracker.finish("completed", {name.replace("eval", "test"): 5.0 for name in NAMES})


def test_wandb_shows_every_name_and_the_best_value_where_it_can(
    config: RunConfig, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = dict.fromkeys(NAMES, "min")
    monkeypatch.setattr("finetune.tracking.wandb.best_values", lambda _: best)
    log_all(WandbTracker(config, folder, Label()))

    (records,) = wandb_files(folder.path)
    history = wandb_history(records)
    summary = wandb_summary(records)
    for name in NAMES:
        assert [row[name] for row in history if name in row] == [3, 1, 2]
        assert summary[name.replace("eval", "test")] == 5
        # W&B has no way to say these.
        has_best = "*" not in name and "\\" not in name
        assert summary[name] == ({"min": 1, "last": 2} if has_best else 2)
    (opened,) = [record.run for record in records if record.HasField("run")]
    lora = wandb_items(opened.config.update)["lora"]
    assert lora["extra"]["rank_pattern"] == {KEY: 4}


def test_a_wandb_run_that_can_not_be_continued_is_no_running_one(
    config: RunConfig, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any) -> None:
        raise ValueError("no metrics")

    monkeypatch.setattr("finetune.tracking.wandb.define_metrics", refuses)
    SeveralTrackers([lambda: WandbTracker(config, folder, Label())])

    (records,) = wandb_files(folder.path)
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [
        1
    ]


def test_tensorboard_shows_every_name(config: RunConfig, folder: RunFolder) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    log_all(TensorboardTracker(config, folder))

    events = EventAccumulator(str(folder.path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(NAMES)
    for name in NAMES:
        assert [event.value for event in events.Scalars(name)] == [3, 1, 2]
    content = events.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams[f"lora.extra.rank_pattern.{KEY}"].number_value == 4


def test_trackio_shows_every_name(
    config: RunConfig, folder: RunFolder, request: pytest.FixtureRequest
) -> None:
    from trackio.sqlite_storage import SQLiteStorage

    log_all(TrackioTracker(config, folder, Label(name=request.node.name)))

    runs = SQLiteStorage.get_run_records("finetune")
    (run_id,) = [run["id"] for run in runs if run["name"] == request.node.name]
    rows = SQLiteStorage.get_logs("finetune", run_id=run_id)
    for name in NAMES:
        assert [row[name] for row in rows if name in row] == [3, 1, 2]
        final = f"final/{name.replace('eval', 'test')}"
        assert [row[final] for row in rows if final in row] == [5]
    shown = SQLiteStorage.get_run_config("finetune", run_id=run_id)
    assert shown is not None
    assert shown["lora"]["extra"]["rank_pattern"] == {KEY: 4}


def test_long_names_of_artifacts_are_cut_and_stay_apart() -> None:
    import wandb

    names = ["s1-adapter", "é" * 200, *("n" * 200 + end for end in "ab")]
    shown = [artifact_name(name) for name in names]
    assert shown[0] == "s1-adapter"
    assert len(set(shown)) == len(names)
    for name in shown:
        wandb.Artifact(name, type="model")


@pytest.mark.parametrize("project", ["a/b", "a#b", "50 %", "a:b", "p" * 129])
def test_a_project_that_wandb_can_not_have_is_refused_before_the_run(
    project: str, tiny: Tiny
) -> None:
    values = tiny().to_dict()
    values["tracker"]["project"] = project

    def check(name: str, mode: str = "auto") -> None:
        values["tracker"] |= {"name": name, "mode": mode}
        check_trackers(RunConfig.from_dict(values).tracker)

    for name in ("wandb", "both"):
        with pytest.raises(ConfigError, match=r"^tracker\.project=.*: W&B takes 128"):
            check(name)
        check(name, "disabled")
    check("mlflow")
    check("none")
