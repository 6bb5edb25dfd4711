"""A baseline outside of the space: it may win, and the space stays what the user gave."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.commands import Station
from support.configs import study_overrides
from support.studies import text_of

from finetune.files.atomic import read_json
from sweeps.answer.importance import comparable_trials
from sweeps.study.formatting import trials_table
from sweeps.study.inside import is_inside, point_of
from sweeps.study.study import Study

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Done:
    study: Study
    stderr: str

    def config(self, number: int) -> Any:
        return read_json(self.study.folder_of(number).identity)["config"]


@pytest.fixture(scope="module")
def done(
    station: Station, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Done:
    """A study whose rates are too small to learn anything, so that the baseline wins."""
    cwd = tmp_path_factory.mktemp("inside")
    ended = station.run(
        *study_overrides(tiny_base, "s"),
        "~search",
        "lora.r=choice(2,4)",
        "optimizer.learning_rate=tag(log,interval(1e-7,1e-6))",
        "lora.alpha=range(2,17,2)",
        "hydra.sweeper.n_trials=5",
        "hydra.sweeper.keep_adapters=1",
        "hydra.sweeper.sampler.n_startup_trials=2",
        cwd=cwd,
    )
    assert ended.returncode == 0, ended.stderr
    return Done(Study.load(cwd / "outputs" / "sweeps" / "s"), ended.stderr)


def test_only_the_baseline_has_values_outside_the_space(done: Done) -> None:
    baseline, *others = done.study.trials()
    assert point_of(baseline) == {
        "lora.r": 16,
        "optimizer.learning_rate": 1e-3,
        "lora.alpha": 16,
    }
    assert baseline.params == {"lora.alpha": 16}
    config = done.config(0)
    assert config["lora"]["r"] == 16
    assert config["optimizer"]["learning_rate"] == 1e-3
    for trial in others:
        assert is_inside(trial)
        assert trial.params["lora.r"] in (2, 4)
        assert 1e-7 <= trial.params["optimizer.learning_rate"] <= 1e-6
        assert done.config(trial.number)["lora"]["r"] == trial.params["lora.r"]
    stored = done.study.optuna.user_attrs["terms"]["space.lora.r"]
    assert stored["attributes"]["choices"] == [2, 4]


def test_the_answer_names_the_baseline_and_the_best_inside(done: Done) -> None:
    answer = json.loads((done.study.folder / "answer.json").read_text())
    inside = next(trial for trial in done.study.ranked() if trial.number != 0)
    assert answer["trial"] == answer["baseline"] == 0
    assert answer["params"]["lora.r"] == 16
    assert answer["inside"] == {
        "trial": inside.number,
        "params": inside.params,
        "objective": {"eval/loss": inside.value},
    }
    (line,) = [line for line in done.stderr.splitlines() if "best inside" in line]
    assert line.split("best inside")[1].strip() == (
        f"trial {inside.number}, eval/loss {inside.value:.4f}; "
        "trial 0 lies outside the search space: lora.r, optimizer.learning_rate"
    )
    # The adapter of the best one inside can be used, though only one is to stay.
    for number in (0, inside.number):
        assert done.study.folder_of(number).adapter.is_dir()


def test_tables_and_report_show_the_values_outside(done: Done) -> None:
    row = trials_table(done.study).splitlines()[1]
    assert row.split()[3:6] == ["16", "16", "0.001"]
    assert "baseline; outside the space (lora.r, optimizer.learning_rate)" in row
    page = text_of(done.study.folder / "report.html")
    assert "best inside the space (trial" in page
    assert "The winner lies outside the search space: lora.r" in page


def test_what_lies_outside_says_nothing_of_the_parameters(done: Done) -> None:
    measured = comparable_trials(done.study.optuna)
    assert 0 not in [trial.number for trial, _ in measured]
