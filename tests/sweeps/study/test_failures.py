"""Failed trials of a study: divergence, refused configs, out of memory, limits on failures."""

import json
from pathlib import Path

import pytest
import yaml
from optuna.trial import TrialState
from support.commands import Station
from support.configs import study_overrides
from support.study_folder import SMALL_MEMORY, folder_of, result_of, trials_of

from finetune.exit_codes import NO_ANSWER
from finetune.version import SCHEMA_VERSION
from sweeps.study.study import FINISHED

DIVERGES = (
    "hydra.sweeper.start=[{optimizer.learning_rate: 1e20}]",
    "optimizer.learning_rate=choice(1e-3,1e-2,1e20)",
)


@pytest.mark.slow
def test_a_trial_that_fails_does_not_end_the_study(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    more = (*DIVERGES, "hydra.sweeper.n_trials=3", "seed=1", "trainer.max_steps=12")
    ended = station.run(*study_overrides(tiny_base, "s"), *more, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr

    trials = trials_of(tmp_path)
    assert all(trial.state in FINISHED for trial in trials)
    assert trials[1].state == TrialState.FAIL
    assert trials[1].user_attrs["role"] == "start"
    assert (
        trials[1]
        .user_attrs["error"]
        .startswith("optimizer.learning_rate=1e+20: training diverged at step")
    )
    assert result_of(tmp_path, 1)["error"] == trials[1].user_attrs["error"]
    assert not (folder_of(tmp_path) / "trials" / "1" / "checkpoints").exists()
    assert f"trial 1    failed: {trials[1].user_attrs['error']}" in ended.stderr


TOO_MUCH = """
import sys, types
sys.modules["mine"] = types.ModuleType("mine")
sys.modules["mine"].further = lambda config, trial: trial.suggest_categorical("lora.dropout", [2.0])
"""
"""A custom search space with a value that no run takes."""


@pytest.mark.slow
def test_a_trial_whose_config_is_refused_says_so_in_its_folder(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    space = (
        "~search",
        "lora.r=choice(4,16)",
        "hydra.sweeper.custom_search_space=mine.further",
    )
    study = [*study_overrides(tiny_base, "s"), *space, "hydra.sweeper.n_trials=1"]
    ended = station.run(*study, cwd=tmp_path, before=TOO_MUCH)
    assert ended.returncode == NO_ANSWER

    (trial,) = trials_of(tmp_path, TrialState.FAIL)
    assert (
        trial.user_attrs["error"] == "lora.dropout=2.0: must be at least 0 and below 1"
    )
    assert result_of(tmp_path, 0) == {
        "schema_version": SCHEMA_VERSION,
        "status": "failed",
        "error": trial.user_attrs["error"],
    }


@pytest.mark.slow
def test_no_failure_allowed_ends_at_the_first(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    more = (
        *DIVERGES,
        "hydra.sweeper.n_trials=6",
        "hydra.sweeper.max_failure_rate=0",
        "trainer.max_steps=12",
    )
    ended = station.run(*study_overrides(tiny_base, "s"), *more, cwd=tmp_path)
    assert ended.returncode == NO_ANSWER
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(
        "error: hydra.sweeper.max_failure_rate=0.0: 1 of 2 trials failed; trial 1: optimizer.learning"
    )
    assert [trial.state for trial in trials_of(tmp_path, *FINISHED)] == [
        TrialState.COMPLETE,
        TrialState.FAIL,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["packed", "trl"])
def test_out_of_memory_goes_on_with_half_the_batch(
    engine: str, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    batch = ("trainer.per_device_train_batch_size=4", f"trainer.engine={engine}")
    more = ("hydra.sweeper.n_trials=1", *batch, "tracker=wandb")
    ended = station.run(
        *study_overrides(tiny_base, "s"), *more, cwd=tmp_path, before=SMALL_MEMORY
    )
    assert ended.returncode == 0, ended.stderr

    (trial,) = trials_of(tmp_path)
    assert trial.state == TrialState.COMPLETE
    assert "trainer.per_device_train_batch_size=2" in trial.user_attrs["shrunk"]
    assert (
        result_of(tmp_path, 0)["engine"],
        result_of(tmp_path, 0)["effective_batch_size"],
    ) == (
        engine,
        4,
    )
    best = yaml.safe_load(
        (folder_of(tmp_path) / "experiment" / "best.yaml").read_text()
    )
    assert best["trainer"]["per_device_train_batch_size"] == 2
    assert best["trainer"]["gradient_accumulation_steps"] == 2
    again = station.run(
        "--config-dir",
        str(folder_of(tmp_path)),
        "experiment=best",
        "hydra.run.dir=again",
        "tracker=none",
        cwd=tmp_path,
    )
    assert again.returncode == 0, again.stderr
    repeated = json.loads((tmp_path / "again" / "result.json").read_text())
    assert repeated["metrics"]["eval/loss"] == trial.value


@pytest.mark.slow
def test_out_of_memory_twice_is_a_failure(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    more = ("hydra.sweeper.n_trials=1", "trainer.per_device_train_batch_size=8")
    ended = station.run(
        *study_overrides(tiny_base, "s"), *more, cwd=tmp_path, before=SMALL_MEMORY
    )
    (trial,) = trials_of(tmp_path)
    assert trial.state == TrialState.FAIL
    assert "out of memory" in trial.user_attrs["error"]
    assert ended.stderr.count("once more with less at once") == 1


@pytest.mark.slow
def test_the_memory_of_thirty_trials_is_that_of_five(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    more = (
        "hydra.sweeper.n_trials=30",
        "hydra.sweeper.keep_adapters=2",
        "quantization=nf4",
    )
    ended = station.run(*study_overrides(tiny_base, "s"), *more, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert len(trials_of(tmp_path, *FINISHED)) == 30
    peaks = [
        result_of(tmp_path, number)["peak_memory_bytes"] / 2**20 for number in range(30)
    ]
    assert max(peaks[26:]) - max(peaks[5:9]) < 8, peaks
    assert len(list(folder_of(tmp_path).glob("trials/*/adapter"))) <= 3
