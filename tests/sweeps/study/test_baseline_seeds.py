"""The baseline trains with further seeds in slots that no trial needs, and the answer uses them."""

import json
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState, create_trial
from support.commands import Station
from support.configs import study_overrides
from support.matrix import further
from support.runs import final, write_jsonl
from support.studies import made_study

from sweeps.study.baseline_seeds import baseline_repeats
from sweeps.study.study import Study

pytestmark = pytest.mark.slow

TRIALS = 3


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows enough for an interval: 40 of 270 are test rows."""
    words = "alpha beta gamma delta epsilon zeta eta theta".split()
    texts = [
        f"{words[n % 8]} {words[n // 8 % 8]} {n} says {n * 7 % 31}." for n in range(270)
    ]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    return write_jsonl(path, [{"text": text} for text in texts])


def search(station: Station, base: Path, cwd: Path, rows: Path, *overrides: str) -> Any:
    study = (
        f"hydra.sweeper.n_trials={TRIALS}",
        "trainer.max_steps=4",
        "hydra/sweeper/pruner=none",
        # In four steps a high rate learns most, so another trial than the baseline wins.
        "hydra.sweeper.start=[{optimizer.learning_rate: 0.01}]",
        f"dataset.path={rows}",
        "dataset.test_fraction=0.15",
    )
    return station.run(*study_overrides(base, "s"), *study, *overrides, cwd=cwd)


def answer(cwd: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(
        (study_folder(cwd) / "answer.json").read_text()
    )
    return content


def study_folder(cwd: Path) -> Path:
    return cwd / "outputs" / "sweeps" / "s"


def seed_folders(cwd: Path) -> list[str]:
    return sorted(path.name for path in (study_folder(cwd) / "baseline").glob("*"))


def test_seeds_are_no_trials_and_the_answer_says_what_they_show(
    station: Station, tiny_base: Path, tmp_path: Path, rows: Path
) -> None:
    ended = search(station, tiny_base, tmp_path, rows, "hydra.sweeper.slots=2")

    assert ended.returncode == 0, ended.stderr
    assert seed_folders(tmp_path) == ["seed1", "seed2"]
    folder = study_folder(tmp_path)
    states = [trial.state for trial in Study.load(folder).trials()]
    assert states == [TrialState.COMPLETE] * TRIALS
    baseline = json.loads((folder / "trials/0/run.json").read_text())["config"]
    for seed in (1, 2):
        result = final(folder / "baseline" / f"seed{seed}")
        assert result["status"] == "completed"
        assert "test/loss" in result["metrics"]
        assert not list(
            (folder / f"baseline/seed{seed}").glob("[ac][dh]*")
        )  # files of weights
        config = json.loads((folder / f"baseline/seed{seed}/run.json").read_text())[
            "config"
        ]
        assert config == baseline | {"seed": seed}
    test = answer(tmp_path)["test"]
    assert answer(tmp_path)["trial"] != 0
    config = test["config"]
    assert (config["seeds"], config["seeds_of"]) == (3, "the baseline")
    low, high = config["interval_95"]
    adapter_low, adapter_high = test["interval_95"]
    assert high - low > adapter_high - adapter_low
    assert ", with 3 seeds of the baseline" in ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("overrides", "seeds"),
    [
        *further(
            (["hydra.sweeper.slots=1"], []),
            (["hydra.sweeper.slots=2", "hydra.sweeper.baseline=false"], []),
        ),
        (["hydra.sweeper.slots=2", "hydra.sweeper.baseline_seeds=0"], []),
        (["hydra.sweeper.slots=1", "hydra.sweeper.baseline_seeds=1"], ["seed1"]),
    ],
)
def test_as_many_seeds_are_trained_as_the_key_says(
    station: Station,
    tiny_base: Path,
    tmp_path: Path,
    rows: Path,
    overrides: list[str],
    seeds: list[str],
) -> None:
    ended = search(station, tiny_base, tmp_path, rows, *overrides)

    assert ended.returncode == 0, ended.stderr
    assert seed_folders(tmp_path) == seeds
    test = answer(tmp_path)["test"]
    assert (test.get("config") is None) == (not seeds)


def test_a_killed_study_goes_on_with_its_seeds(
    station: Station, tiny_base: Path, tmp_path: Path, rows: Path
) -> None:
    overrides = ["hydra.sweeper.slots=2"]
    search(station, tiny_base, tmp_path, rows, *overrides)
    folder = study_folder(tmp_path)
    finished = (folder / "baseline/seed1/run.json").stat().st_mtime_ns
    # As if the worker had been killed while the second seed trained.
    (folder / "baseline/seed2/result.json").unlink()

    ended = search(
        station,
        tiny_base,
        tmp_path,
        rows,
        *overrides,
        f"hydra.sweeper.n_trials={TRIALS + 1}",
    )

    assert ended.returncode == 0, ended.stderr
    assert len(Study.load(folder).trials()) == TRIALS + 1
    assert final(folder / "baseline/seed2")["status"] == "completed"
    assert (folder / "baseline/seed1/run.json").stat().st_mtime_ns == finished


def test_a_machine_without_the_baselines_folder_trains_no_seeds(tmp_path: Path) -> None:
    baseline = create_trial(
        value=1.0, user_attrs={"role": "baseline"}, intermediate_values={1: 1.0}
    )
    study = made_study(tmp_path / "s", [baseline])

    assert baseline_repeats(study, 2) == []
