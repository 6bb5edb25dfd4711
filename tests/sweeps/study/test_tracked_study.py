"""What MLflow and Trackio show of a whole study, by both at once."""

from pathlib import Path
from typing import Any

import pytest
from support.commands import Station
from support.configs import study_overrides

from finetune.files.run_folder import RunFolder
from finetune.tracking.mlflow_store import open_store
from sweeps.study.study import Study

pytestmark = pytest.mark.slow


def test_each_trial_of_a_study_is_one_run_in_every_tracker(
    station: Station,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "outputs" / "sweeps" / "s1"
    # The second command goes on with the study of the first one.
    for trials in (3, 5):
        ended = station.run(
            *study_overrides(tiny_base, "s1"),
            "tracker.name=[mlflow,trackio]",
            "hydra.sweeper.slots=2",
            f"hydra.sweeper.n_trials={trials}",
            cwd=tmp_path,
        )
        assert ended.returncode == 0, ended.stderr
        assert "the run goes on without it" not in ended.stderr

    study = Study.load(folder)
    shown = mlflow_runs(tmp_path)
    numbers = [trial.number for trial in study.trials()]
    trials_shown = {
        name: run for name, run in shown.items() if run.data.tags["job_type"] == "trial"
    }
    assert sorted(name.split()[0] for name in trials_shown) == [
        f"t{number:02d}" for number in numbers
    ]
    best = [name for name, run in shown.items() if "best" in run.data.tags]
    assert [name.split()[0] for name in best] == [f"t{study.ranked()[0].number:02d}"]
    for name, run in trials_shown.items():
        number = int(name.split()[0][1:])
        result = RunFolder(folder / "trials" / str(number))
        last = result.metrics()[-1]
        assert run.data.tags["group"] == "s1"
        assert run.data.tags["status"] in ("completed", "pruned")
        objective = last.get("eval/loss")
        if objective is not None:
            assert run.data.metrics["eval/loss"] == objective
    assert trackio_names(tmp_path) == sorted(shown)


def mlflow_runs(place: Path) -> dict[str, Any]:
    store = open_store(f"sqlite:///{place / 'mlflow.db'}")
    experiment = store.get_experiment_by_name("finetune/s1")
    assert experiment is not None
    runs = store.search_runs([experiment.experiment_id])
    return {str(run.info.run_name): run for run in runs}


def trackio_names(place: Path) -> list[str]:
    import sqlite3

    with sqlite3.connect(place / "trackio" / "finetune.db") as database:
        rows = database.execute("SELECT DISTINCT run_name, run_id FROM metrics")
        return sorted(name for name, _ in rows)
