"""What W&B and TensorBoard are shown, read back from their own files; and that they never end a
run."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.private_texts import texts_of_user
from support.wandb_log import wandb_files, wandb_history, wandb_items, wandb_summary

from finetune.config.schema import RunConfig
from finetune.engine.observer import Observer, Rung
from finetune.files.run_folder import RunFolder
from finetune.run.context import RunContext
from finetune.run.run import run
from finetune.tracking.wandb_finished import add_tag

Tiny = Callable[..., RunConfig]

QUICK = (
    "trainer.max_steps=1",
    "sample_prompts=[]",
    "quantization=none",
    "dataset.max_length=64",
    "trainer.save_steps=0",
)


def wandb_records(folder: Path) -> list[Any]:
    """The records of the one offline run below a folder."""
    (records,) = wandb_files(folder)
    return records


def test_wandb_offline_holds_config_history_and_final_state(
    tiny: Tiny, tmp_path: Path
) -> None:
    run(
        tiny(
            "tracker=wandb", "tracker.tags=[first]", "trainer.max_steps=4", "name=shown"
        ),
        tmp_path,
    )

    records = wandb_records(tmp_path)
    opened = next(
        record.run for record in records if record.WhichOneof("record_type") == "run"
    )
    history, summary = wandb_history(records), wandb_summary(records)
    config = wandb_items(opened.config.update)
    assert opened.display_name == "shown"
    assert list(opened.tags) == ["first"]
    assert config["lora"]["r"] == 16
    assert config["optimizer"]["name"] == "adamw_torch"
    logged = [
        json.loads(line)
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    for name in ("train/loss", "eval/loss", "objective"):
        assert [row[name] for row in history if name in row] == [
            row[name] for row in logged if name in row
        ]
    assert any(name.startswith("samples") for row in history for name in row)
    assert summary["status"] == "completed"
    assert summary["test/loss"] == logged[-1]["test/loss"]


class StopsAtFirstRung(Observer):
    def should_prune(self, rung: Rung) -> bool:
        return rung.index == 1


@pytest.mark.parametrize("save_steps", [1, 0], ids=["from a checkpoint", "anew"])
def test_a_run_that_goes_on_offline_is_one_whole_run(
    save_steps: int, tiny: Tiny, tmp_path: Path
) -> None:
    steps = (
        "trainer.max_steps=4",
        "trainer.eval_steps=2",
        f"trainer.save_steps={save_steps}",
    )
    config = tiny("tracker=wandb", *QUICK, *steps)
    for observer in (StopsAtFirstRung(), Observer()):
        run(config, tmp_path, RunContext(observer))

    records = wandb_records(tmp_path)
    (opened,) = [record.run for record in records if record.HasField("run")]
    assert not opened.resume
    assert [row["_step"] for row in wandb_history(records)] == [0, 1, 2, 3, 4]
    assert wandb_items(opened.config.update)["trainer"]["max_steps"] == 4
    summary = wandb_summary(records)
    assert summary["status"] == "completed"
    assert "pruned_at" not in summary


@pytest.mark.fault
def test_a_run_that_fails_before_its_first_step_has_no_history_offline(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no base")

    monkeypatch.setattr("finetune.run.train.start_training", fails)
    with pytest.raises(RuntimeError, match="no base"):
        run(tiny("tracker=wandb", *QUICK), tmp_path)

    records = wandb_records(tmp_path)
    assert wandb_history(records) == []
    assert wandb_summary(records)["status"] == "failed"


def test_tensorboard_has_the_same_names(tiny: Tiny, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tiny("tracker=both", "trainer.max_steps=2"), tmp_path)

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = [
        json.loads(line)
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert set(events.Tags()["scalars"]) == {name for row in rows for name in row} - {
        "step"
    }
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]


def hparams_context(folder: Path) -> tuple[Any, Any]:
    """What TensorBoard itself collects for its HParams page, and the experiment in it."""
    from tensorboard.backend.event_processing.data_provider import (
        MultiplexerDataProvider,
    )
    from tensorboard.backend.event_processing.plugin_event_multiplexer import (
        EventMultiplexer,
    )
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import backend_context

    events = EventMultiplexer().AddRunsFromDirectory(str(folder))
    events.Reload()
    provider = MultiplexerDataProvider(events, str(folder))
    context = backend_context.Context(TBContext(data_provider=provider))
    experiment = context.experiment_from_metadata(
        RequestContext(),
        "",
        True,
        context.hparams_metadata(RequestContext(), ""),
        [],
    )
    return context, experiment


def sessions_with(status: str, context: Any) -> list[Any]:
    """The groups of sessions that the HParams page shows with a status."""
    from tensorboard.context import RequestContext
    from tensorboard.plugins.hparams import api_pb2, list_session_groups

    request = api_pb2.ListSessionGroupsRequest(
        allowed_statuses=[getattr(api_pb2, status)], start_index=0, slice_size=9
    )
    handler = list_session_groups.Handler(RequestContext(), context, "", request)
    return list(handler.run().session_groups)


def test_tensorboard_shows_the_config_as_hparams(tiny: Tiny, tmp_path: Path) -> None:
    for rate in ("1e-3", "1e-4"):
        overrides = ("tracker=tensorboard", f"optimizer.learning_rate={rate}", *QUICK)
        run(tiny(*overrides), tmp_path / rate)

    context, experiment = hparams_context(tmp_path)
    keys = {info.name for info in experiment.hparam_infos}
    assert {"optimizer.learning_rate", "lora.r", "lora.target_modules"} <= keys
    metrics = {info.name.tag for info in experiment.metric_infos}
    assert {"eval/loss", "objective"} <= metrics
    rates = [
        group.hparams["optimizer.learning_rate"].number_value
        for group in sessions_with("STATUS_SUCCESS", context)
    ]
    assert sorted(rates) == [1e-4, 1e-3]


@pytest.mark.parametrize(
    ("ended", "shown"),
    [
        ("completed", "STATUS_SUCCESS"),
        ("failed", "STATUS_FAILURE"),
        (None, "STATUS_UNKNOWN"),
    ],
)
def test_tensorboard_shows_the_last_session_of_a_run(
    ended: str | None, shown: str, tiny: Tiny, tmp_path: Path
) -> None:
    from finetune.tracking.tensorboard import TensorboardTracker

    folder = RunFolder(tmp_path / "run")
    config = tiny("tracker=tensorboard")
    TensorboardTracker(config, folder).finish("interrupted", {})
    resumed = TensorboardTracker(config, folder)
    if ended is not None:
        resumed.finish(ended, {})

    context, _ = hparams_context(tmp_path)
    assert len(sessions_with(shown, context)) == 1


def test_several_trackers_show_one_run(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(tiny("tracker.name=[wandb,tensorboard,mlflow]", *QUICK), tmp_path / "run")

    folder = tmp_path / "run"
    assert wandb_history(wandb_records(folder))
    assert list((folder / "tensorboard").iterdir())
    assert (folder / "mlflow.json").exists()
    assert (tmp_path / "mlflow.db").exists()
    assert "trackio" not in os.listdir(folder)


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("wandb", ["wandb"]),
        ("both", ["wandb", "tensorboard"]),
        ("none", []),
        ("[]", []),
        ("[mlflow,both,wandb]", ["mlflow", "wandb", "tensorboard"]),
    ],
)
def test_trackers_are_named_alone_or_in_a_list(
    name: str, names: list[str], tiny: Tiny
) -> None:
    assert tiny(f"tracker.name={name}").tracker.names == names


def test_a_choice_that_is_not_taken_imports_nothing(tiny: Tiny, tmp_path: Path) -> None:
    order = tmp_path / "config.json"
    order.write_text(json.dumps(tiny("tracker=tensorboard", *QUICK).to_dict()))
    code = (
        "import json, sys\n"
        "from finetune.config.schema import RunConfig\n"
        "from finetune.run.run import run\n"
        "run(RunConfig.from_dict(json.load(open(sys.argv[1]))), sys.argv[2])\n"
        "sys.exit(str({'wandb', 'mlflow', 'trackio'} & sys.modules.keys()))\n"
    )
    command = [sys.executable, "-c", code, str(order), str(tmp_path / "run")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.stderr.splitlines()[-1] == "set()"


@pytest.fixture
def deaf_server() -> Iterator[str]:
    """An address on this machine that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.fault
def test_a_server_that_does_not_answer_leaves_the_run_offline(
    tiny: Tiny, tmp_path: Path, deaf_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", deaf_server)
    run(tiny("tracker=wandb", "trainer.max_steps=2", "sample_prompts=[]"), tmp_path)

    assert json.loads((tmp_path / "result.json").read_text())["status"] == "completed"
    assert wandb_history(wandb_records(tmp_path))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if b"0" * 40 in path.read_bytes()]


def test_without_a_key_nothing_asks_and_the_run_is_offline(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("NETRC", os.devnull)
    run(tiny("tracker=wandb", "trainer.max_steps=1", "sample_prompts=[]"), tmp_path)

    assert wandb_records(tmp_path)


def artifacts(folder: Path) -> list[Any]:
    return [
        record.artifact
        for record in wandb_records(folder)
        if record.HasField("artifact")
    ]


@pytest.mark.parametrize(
    ("adapters", "interactive", "count"),
    [("none", True, 0), ("best", True, 1), ("best", False, 0), ("all", False, 1)],
)
def test_wandb_gets_the_adapters_that_it_shall(
    adapters: str, interactive: bool, count: int, tiny: Tiny, tmp_path: Path
) -> None:
    run(
        tiny("tracker=wandb", f"tracker.adapters={adapters}", *QUICK),
        tmp_path,
        RunContext(interactive=interactive),
    )

    logged = artifacts(tmp_path)
    assert [(artifact.type, artifact.name) for artifact in logged] == [
        ("model", "default-adapter")
    ] * count
    files = {file.name: file.read_bytes() for file in (tmp_path / "adapter").iterdir()}
    shutil.rmtree(
        tmp_path / "adapter"
    )  # a study removes those of most trials, perhaps before they are synced
    for artifact in logged:
        assert {
            file.path: Path(file.local_path).read_bytes()
            for file in artifact.manifest.contents
        } == files


def test_an_adapter_that_wandb_can_not_take_is_a_warning(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", f"{os.devnull}/nowhere")
    run(
        tiny("tracker=wandb", "tracker.adapters=all", *QUICK),
        tmp_path,
        RunContext(interactive=False),
    )

    (line,) = [
        record.message
        for record in caplog.records
        if record.name == "finetune.tracking.wandb"
    ]
    assert line.endswith(f"it lacks the adapter, which is in {tmp_path / 'adapter'}")
    assert not artifacts(tmp_path)
    shown = [
        wandb_items(record.summary.update)
        for record in wandb_records(tmp_path)
        if record.HasField("summary")
    ]
    assert "completed" in [summary.get("status") for summary in shown]


def test_a_run_that_was_written_down_before_there_was_a_key_is_read(tiny: Tiny) -> None:
    config = tiny()
    values = config.to_dict()
    del values["tracker"]["adapters"], values["tracker"]["workspace"]
    assert RunConfig.from_dict(values) == config


def files_with(text: str, folder: Path) -> set[str]:
    """The names of the trackers' folders in which a file holds a text."""
    trackers = set()
    for tracker in ("wandb", "tensorboard"):
        for file in (folder / tracker).rglob("*"):
            if file.is_file() and text.encode() in file.read_bytes():
                trackers.add(tracker)
    return trackers


@pytest.mark.parametrize("fails", [False, True], ids=["completes", "fails"])
@pytest.mark.parametrize("prompts", ["null", "[A quetzal?]"], ids=["of rows", "given"])
@pytest.mark.parametrize("text", [True, False])
def test_no_text_is_in_any_tracker_unless_it_may(
    text: bool,
    prompts: str,
    fails: bool,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overrides, secret = texts_of_user(tmp_path)
    monkeypatch.setattr("sys.argv", ["finetune", *overrides])
    folder = tmp_path / "run"
    given = (
        *QUICK,
        "tracker=both",
        f"tracker.text={text}",
        f"sample_prompts={prompts}",
    )
    config = tiny(*given, *overrides)
    if fails:

        def refuse(*_: Any) -> Any:
            raise ValueError(f"{secret} is no row")

        monkeypatch.setattr("finetune.run.train.start_training", refuse)
        with pytest.raises(ValueError, match="no row"):
            run(config, folder)
    else:
        run(config, folder)

    summary = wandb_summary(wandb_records(folder))
    assert summary["status"] == ("failed" if fails else "completed")
    assert files_with(secret, folder) == ({"wandb", "tensorboard"} if text else set())
    # The files of the run itself hold everything.
    assert secret in (folder / "run.json").read_text()
    local = "result.json" if fails else "samples.json"
    assert secret in (folder / local).read_text()
    add_tag(RunFolder(folder), "later")
    records = wandb_records(folder)
    opened = next(record.run for record in records if record.HasField("run"))
    assert "later" in opened.tags
    assert wandb_items(opened.config.update)["lora"]["r"] == 16
    assert ("wandb" in files_with(secret, folder)) == text
