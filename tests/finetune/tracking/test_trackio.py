"""What Trackio is shown, read back from its local database."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trackio
from support.killed_runs import run_until_killed
from support.private_texts import texts_of_user
from support.runs import train_in_slots
from trackio.sqlite_storage import SQLiteStorage

from finetune.config.schema import RunConfig
from finetune.files.run_folder import RunFolder
from finetune.run.context import RunContext
from finetune.run.run import run
from finetune.tracking.tracker import Label

Tiny = Callable[..., RunConfig]

QUICK = (
    "tracker.name=trackio",
    "trainer.max_steps=4",
    "trainer.eval_steps=1",
    "trainer.logging_steps=1",
    "sample_prompts=[]",
    "quantization=none",
    "dataset.max_length=64",
)


@pytest.fixture
def project(request: pytest.FixtureRequest) -> str:
    """A project of the test alone: all are in one folder of the session."""
    return "".join(letter for letter in request.node.name if letter.isalnum())


def runs(project: str) -> list[Any]:
    return SQLiteStorage.get_run_records(project)


def config_of(project: str, run_id: str) -> dict[str, Any]:
    config = SQLiteStorage.get_run_config(project, run_id=run_id)
    assert config is not None
    return config


def logged(project: str, run_id: str) -> list[tuple[int, str, float]]:
    """Step, name and value of everything that was logged, without the final values."""
    return sorted(
        (row["step"], name, value)
        for row in SQLiteStorage.get_logs(project, run_id=run_id)
        for name, value in row.items()
        if name not in ("step", "timestamp", "samples")
        and not name.startswith("final/")
    )


def written(folder: Path) -> list[tuple[int, str, float]]:
    """The same of `metrics.jsonl`."""
    return sorted(
        (row["step"], name, value)
        for row in RunFolder(folder).metrics()
        for name, value in row.items()
        if name != "step"
    )


def test_trackio_holds_config_history_and_final_state(
    tiny: Tiny, tmp_path: Path, project: str
) -> None:
    config = tiny(
        *QUICK,
        f"tracker.project={project}",
        "name=shown",
        "sample_prompts=[What is a list?]",
        "tracker.adapters=all",
    )
    run(config, tmp_path / "run")

    (shown,) = runs(project)
    assert shown["name"] == "shown"
    assert logged(project, shown["id"]) == written(tmp_path / "run")
    config_shown = config_of(project, shown["id"])
    assert config_shown["lora"]["r"] == 16
    assert config_shown["status"] == "completed"
    rows = SQLiteStorage.get_logs(project, run_id=shown["id"])
    (final,) = [row["final/test/loss"] for row in rows if "final/test/loss" in row]
    assert (4, "test/loss", final) in written(tmp_path / "run")
    assert any("samples" in row for row in rows)


def test_runs_of_a_pack_are_one_trackio_run_each(
    tiny: Tiny, tmp_path: Path, project: str
) -> None:
    given = (*QUICK, f"tracker.project={project}", "name=same")
    configs = [tiny(*given, f"seed={seed}") for seed in range(3)]
    places = train_in_slots(configs, tmp_path / "pack", slots=2)

    shown = {config_of(project, each["id"])["seed"]: each for each in runs(project)}
    assert sorted(shown) == [0, 1, 2]
    for number, place in enumerate(places):
        assert logged(project, shown[number]["id"]) == written(place)


def test_a_run_that_is_open_in_the_process_stays_open(
    tiny: Tiny, tmp_path: Path, project: str
) -> None:
    """One of a notebook, for example; and so those of a pack."""
    opened = trackio.init(project=f"{project}other", auto_log_cpu=False)
    try:
        run(tiny(*QUICK, f"tracker.project={project}"), tmp_path / "run")
        assert trackio.context_vars.current_run.get() is opened
    finally:
        trackio.finish()


def test_a_trial_stands_in_the_group_of_its_study(
    tiny: Tiny, tmp_path: Path, project: str
) -> None:
    label = Label(name="3 lora.r=8", group="s1", job_type="trial")
    config = tiny(*QUICK, f"tracker.project={project}")
    run(config, tmp_path / "run", RunContext(label=label, interactive=False))

    (shown,) = runs(project)
    assert shown["name"] == "3 lora.r=8"
    assert config_of(project, shown["id"])["_Group"] == "s1"


@pytest.mark.fault
@pytest.mark.parametrize("save_steps", [2, 0], ids=["from a checkpoint", "anew"])
def test_a_killed_run_continues_as_one_run(
    save_steps: int, tiny: Tiny, tmp_path: Path, project: str
) -> None:
    config = tiny(
        *QUICK, f"tracker.project={project}", f"trainer.save_steps={save_steps}"
    )
    run_until_killed(config, tmp_path / "run")
    record = (tmp_path / "run" / "trackio.json").read_text()
    run(config, tmp_path / "run")

    (shown,) = runs(project)
    assert (shown["id"] in record) == (save_steps > 0)
    places = [place[:2] for place in written(tmp_path / "run")]
    assert [place[:2] for place in logged(project, shown["id"])] == places


def test_nothing_is_printed(
    tiny: Tiny, tmp_path: Path, project: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny(*QUICK, f"tracker.project={project}")
    run(config, tmp_path / "run", RunContext(interactive=False))
    assert "rackio" not in capfd.readouterr().out


def test_texts_stay_out_of_trackio(tiny: Tiny, tmp_path: Path, project: str) -> None:
    overrides, secret = texts_of_user(tmp_path)
    config = tiny(
        *QUICK,
        *overrides,
        f"tracker.project={project}",
        f"sample_prompts=[{secret}]",
        "tracker.text=false",
    )
    run(config, tmp_path / "run")

    path = SQLiteStorage.get_project_db_path(project)
    contents = [file.read_bytes() for file in path.parent.glob(f"{path.name}*")]
    assert contents
    assert not any(secret.encode() in content for content in contents)
