"""What MLflow is shown, read back from a local database."""

import importlib.util
import itertools
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.killed_runs import run_until_killed
from support.private_texts import texts_of_user
from support.runs import train_in_slots

from finetune.config.schema import RunConfig
from finetune.errors import ConfigError
from finetune.files.run_folder import PROGRESS, RunFolder
from finetune.run.context import RunContext
from finetune.run.run import run
from finetune.tracking.finished import add_tag, remove_tag
from finetune.tracking.mlflow import MlflowTracker
from finetune.tracking.mlflow_names import VALUE_LENGTH, mlflow_name
from finetune.tracking.mlflow_store import open_store, show_store
from finetune.tracking.tracker import Label, SeveralTrackers

Tiny = Callable[..., RunConfig]

QUICK = (
    "tracker.name=mlflow",
    "trainer.max_steps=4",
    "trainer.eval_steps=1",
    "trainer.logging_steps=1",
    "sample_prompts=[]",
    "quantization=none",
    "dataset.max_length=64",
)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database: MLflow takes seconds to create one."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    open_store(f"sqlite:///{path}")
    return path


@pytest.fixture(autouse=True)
def store(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The client of an empty database in the working directory."""
    shutil.copy(database, tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.chdir(tmp_path)
    return open_store(f"sqlite:///{tmp_path / 'mlflow.db'}")


def runs(store: Any, experiment: str) -> list[Any]:
    shown = store.get_experiment_by_name(experiment)
    return list(store.search_runs([shown.experiment_id])) if shown else []


def history(store: Any, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """The steps and values of each metric, without the final values."""
    values = {}
    for name in store.get_run(run_id).data.metrics:
        if not name.startswith("final/"):
            rows = store.get_metric_history(run_id, name)
            values[name] = sorted((row.step, row.value) for row in rows)
    return values


def written(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The same of `metrics.jsonl`."""
    values: dict[str, list[tuple[int, float]]] = {}
    for row in RunFolder(folder).metrics():
        step = row.pop("step")
        for name, value in row.items():
            values.setdefault(name, []).append((step, value))
    return values


def test_mlflow_holds_config_history_and_final_state(
    tiny: Tiny, tmp_path: Path, store: Any
) -> None:
    config = tiny(*QUICK, "name=shown", "tracker.tags=[first]", "objective_at=best")
    run(config, tmp_path / "run")

    (shown,) = runs(store, "finetune")
    assert shown.info.run_name == "shown"
    assert shown.info.status == "FINISHED"
    assert shown.data.params["lora.r"] == "16"
    assert shown.data.params["optimizer.name"] == "adamw_torch"
    assert shown.data.tags["status"] == "completed"
    assert shown.data.tags["first"] == "true"
    assert history(store, shown.info.run_id) == written(tmp_path / "run")
    rows = written(tmp_path / "run")
    best = min(value for _, value in rows["eval/loss"])
    assert shown.data.metrics["final/eval/loss"] == best
    assert shown.data.metrics["final/test/loss"] == rows["test/loss"][-1][1]


def test_samples_and_adapter_are_artifacts(
    tiny: Tiny, tmp_path: Path, store: Any
) -> None:
    prompt = "sample_prompts=[What is a list?]"
    run(tiny(*QUICK, prompt, "tracker.adapters=all"), tmp_path / "run")

    (shown,) = runs(store, "finetune")
    run_id = shown.info.run_id
    names = {file.path for file in store.list_artifacts(run_id)}
    assert names == {"samples.json", "adapter"}
    path = store.download_artifacts(run_id, "samples.json", str(tmp_path))
    assert "What is a list?" in Path(path).read_text()
    adapter = {file.path for file in store.list_artifacts(run_id, "adapter")}
    assert "adapter/adapter_model.safetensors" in adapter


def test_runs_of_a_pack_are_one_mlflow_run_each(
    tiny: Tiny, tmp_path: Path, store: Any
) -> None:
    configs = [tiny(*QUICK, f"seed={seed}", f"name=seed{seed}") for seed in range(3)]
    places = train_in_slots(configs, tmp_path / "pack", slots=2)

    shown = {each.info.run_name: each for each in runs(store, "finetune")}
    assert sorted(shown) == ["seed0", "seed1", "seed2"]
    for number, place in enumerate(places):
        run_id = shown[f"seed{number}"].info.run_id
        assert history(store, run_id) == written(place)


def test_a_trial_stands_in_the_experiment_of_its_study(
    tiny: Tiny, tmp_path: Path, store: Any
) -> None:
    label = Label(name="3 lora.r=8", group="s1", job_type="trial")
    context = RunContext(label=label, interactive=False)
    tags = "tracker.tags=[group,mine]"
    run(tiny(*QUICK, "tracker.project=mine", tags), tmp_path / "run", context)

    (shown,) = runs(store, "mine/s1")
    assert shown.info.run_name == "3 lora.r=8"
    assert shown.data.tags["group"] == "s1"
    assert shown.data.tags["job_type"] == "trial"
    assert shown.data.tags["mine"] == "true"


@pytest.mark.fault
@pytest.mark.parametrize("save_steps", [2, 0], ids=["from a checkpoint", "anew"])
def test_a_killed_run_continues_as_one_run(
    save_steps: int, tiny: Tiny, tmp_path: Path, store: Any
) -> None:
    config = tiny(*QUICK, f"trainer.save_steps={save_steps}")
    run_until_killed(config, tmp_path / "run")
    (killed,) = runs(store, "finetune")
    assert killed.info.status == "RUNNING"
    # Written to MLflow, but not to be repeated there after the checkpoint at step 2.
    assert history(store, killed.info.run_id)["eval/loss"][-1][0] == 3
    run(config, tmp_path / "run")

    (shown,) = runs(store, "finetune")
    assert (shown.info.run_id == killed.info.run_id) == (save_steps > 0)
    assert shown.info.status == "FINISHED"
    steps = {
        name: [step for step, _ in values]
        for name, values in history(store, shown.info.run_id).items()
    }
    assert steps == {
        name: [step for step, _ in values]
        for name, values in written(tmp_path / "run").items()
    }


def test_a_failed_run_is_shown_with_its_error(
    tiny: Tiny, tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no base")

    monkeypatch.setattr("finetune.run.train.start_training", fails)
    with pytest.raises(RuntimeError, match="no base"):
        run(tiny(*QUICK), tmp_path / "run")

    (shown,) = runs(store, "finetune")
    assert shown.info.status == "FAILED"
    assert "no base" in shown.data.tags["error"]


def test_texts_stay_out_of_mlflow(tiny: Tiny, tmp_path: Path, store: Any) -> None:
    overrides, secret = texts_of_user(tmp_path)
    prompts = f"sample_prompts=[{secret}]"
    config = tiny(*QUICK, *overrides, prompts, "tracker.text=false")
    run(config, tmp_path / "run")

    assert secret.encode() not in (tmp_path / "mlflow.db").read_bytes()
    (shown,) = runs(store, "finetune")
    assert store.list_artifacts(shown.info.run_id) == []


def test_a_winner_has_the_tag_best_and_loses_it(
    tiny: Tiny, tmp_path: Path, store: Any
) -> None:
    run(tiny(*QUICK), tmp_path / "run")
    folder = RunFolder(tmp_path / "run")

    add_tag(folder, "best")
    assert runs(store, "finetune")[0].data.tags["best"] == "true"
    remove_tag(folder, "best")
    assert "best" not in runs(store, "finetune")[0].data.tags


def test_a_store_out_of_reach_does_not_end_the_run(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with caplog.at_level(logging.WARNING):
        run(tiny(*QUICK), tmp_path / "run")

    assert "the run goes on without it" in caplog.text
    assert "secret" not in caplog.text
    assert not (tmp_path / "run" / "mlflow.json").exists()


def test_a_missing_package_is_refused_in_one_line(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "mlflow" else find_spec(name),
    )
    with pytest.raises(ConfigError, match=r'pip install "qlora-sweeps\[mlflow\]"'):
        run(tiny(*QUICK), tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://me:secret@host:5000/ml", "https://host:5000/ml"),
        ("postgresql://me:secret@host/db", "a store of postgresql"),
        ("databricks", "a store of MLflow"),
    ],
)
def test_a_shown_address_has_no_password(address: str, shown: str) -> None:
    assert show_store(address) == shown


LETTERS = "aB9_é -.:/@(*%+\\\n"


def names_of_all_kinds() -> list[str]:
    """Short names of all sorts of characters, and long ones that differ at their ends."""
    short = [
        "".join(letters)
        for length in range(4)
        for letters in itertools.product(LETTERS, repeat=length)
    ]
    long = [f"{'n' * length}{end}" for length in (249, 250, 300) for end in "@(/a"]
    return [*short, *long]


def test_mlflow_takes_every_name_and_tells_them_apart() -> None:
    from mlflow.utils import validation

    names = names_of_all_kinds()
    shown = [mlflow_name(name) for name in names]
    assert len(set(shown)) == len(names)
    for name, new in zip(names, shown, strict=True):
        validation._validate_metric(new, 1.0, 0, 0)
        validation._validate_param(new, "")
        assert "\n" not in new
        try:
            validation._validate_metric(name, 1.0, 0, 0)
        except Exception:
            continue
        # A name ends in no line break, which MLflow's own check lets pass.
        assert new == name or name.endswith("\n")


NAMES = (
    "eval/recall@5",
    "eval/recall(5)",
    "eval/faq (new)/loss",
    "eval//loss",
    "eval/é",
)


def test_a_run_with_any_names_is_shown_to_its_end(
    tiny: Tiny, tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of metrics, config keys, tags, and values that are too long."""
    # By default MLflow cuts long values itself.
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")
    values = tiny(*QUICK, "tracker.tags=['50 %','a/']").to_dict()
    values["name"] = "n" * 300
    values["lora"]["extra"]["rank_pattern"] = {"^m.*(q|v)_proj$": 4}
    values["sample_prompts"] = ["p" * 10_000]
    config = RunConfig.from_dict(values)
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    tracker = MlflowTracker(config, folder, Label())
    metrics = {name: float(number) for number, name in enumerate(NAMES)}
    tracker.log(1, metrics)
    tracker.add_tags(["100 %"])
    error = "e" * 10_000
    tracker.finish("failed", {**metrics, "error": error})

    (shown,) = runs(store, "finetune")
    assert shown.info.status == "FAILED"
    assert len(shown.info.run_name) == 250
    for name, value in metrics.items():
        assert shown.data.metrics[mlflow_name(name)] == value
        assert shown.data.metrics[mlflow_name(f"final/{name}")] == value
    patterns = {
        key: value
        for key, value in shown.data.params.items()
        if key.startswith("lora.extra.rank_pattern")
    }
    assert list(patterns.values()) == ["4"]
    assert {mlflow_name(tag) for tag in ("50 %", "a/", "100 %")} <= set(shown.data.tags)
    assert shown.data.tags["error"] == f"{error[: VALUE_LENGTH - 1]}…"
    assert len(shown.data.params["sample_prompts"]) == VALUE_LENGTH


def test_a_changed_name_is_logged_once_where_a_run_goes_on(
    tiny: Tiny, tmp_path: Path, store: Any
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    config = tiny(*QUICK)
    MlflowTracker(config, folder, Label()).log(1, {"eval/recall@5": 1.0})
    checkpoint = folder.checkpoints / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / PROGRESS).write_text("{}")
    tracker = MlflowTracker(config, folder, Label())
    tracker.log(1, {"eval/recall@5": 1.0})
    tracker.log(2, {"eval/recall@5": 2.0})
    tracker.finish("completed", {})

    (shown,) = runs(store, "finetune")
    name = mlflow_name("eval/recall@5")
    assert history(store, shown.info.run_id) == {name: [(1, 1.0), (2, 2.0)]}


@pytest.mark.parametrize("call", ["log_batch", "set_tag"])
def test_a_tracker_that_fails_leaves_no_run_that_seems_to_train(
    call: str,
    tiny: Tiny,
    tmp_path: Path,
    store: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """When it opens (params), or at its end (the status)."""

    def refuses(*_: Any, **__: Any) -> Any:
        raise ValueError("no room")

    monkeypatch.setattr(store, call, refuses)
    run(tiny(*QUICK), tmp_path / "run")

    assert "no room; the run goes on without it" in caplog.text
    (shown,) = runs(store, "finetune")
    assert shown.info.status == "FAILED"
    assert shown.info.end_time is not None


def test_a_run_whose_server_was_away_is_ended_when_it_is_back(
    tiny: Tiny, tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(*QUICK)
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    trackers = SeveralTrackers([lambda: MlflowTracker(config, folder, Label())])

    def is_away(*_: Any, **__: Any) -> Any:
        raise ConnectionError("away")

    with monkeypatch.context() as server:
        for call in ("log_batch", "set_tag", "set_terminated"):
            server.setattr(store, call, is_away)
        trackers.log(1, {"eval/loss": 1.0})
    assert runs(store, "finetune")[0].info.status == "RUNNING"
    trackers.log(2, {"eval/loss": 1.0})
    trackers.finish("completed", {})

    (shown,) = runs(store, "finetune")
    assert shown.info.status == "FAILED"
    assert shown.data.tags["error"] == "tracker: away"
