"""The rungs that `trainer.eval_steps=auto` stands for: of a run, of a study, of a resumed one."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.commands import Station
from support.configs import study_overrides
from support.study_folder import folder_of, metrics_of

from finetune.app import compose_run, compose_sweep
from finetune.config.plain_values import RUN_EVAL_STEPS, STUDY_EVAL_STEPS
from finetune.config.schema import RunConfig

STUDY = "hydra/sweeper=optuna"


def search(station: Station, base: Path, cwd: Path, trials: int, *more: str) -> Any:
    return station.run(
        *study_overrides(base, "s"),
        "trainer.max_steps=18",
        "hydra.sweeper.baseline_seeds=0",
        f"hydra.sweeper.n_trials={trials}",
        *more,
        cwd=cwd,
    )


def eval_steps_of(cwd: Path, number: int) -> Any:
    """Return the value in a trial's `run.json`."""
    text = (folder_of(cwd) / "trials" / str(number) / "run.json").read_text()
    return json.loads(text)["config"]["trainer"]["eval_steps"]


@pytest.mark.parametrize(
    ("overrides", "eval_steps"),
    [
        ([], RUN_EVAL_STEPS),
        (["experiment=llama2_guanaco"], RUN_EVAL_STEPS),
        (["trainer=debug"], RUN_EVAL_STEPS),
        ([STUDY], STUDY_EVAL_STEPS),
        ([STUDY, "lora.r=choice(4,8)"], STUDY_EVAL_STEPS),
        ([STUDY, "trainer.eval_steps=0.5"], 0.5),
        (["lora.r=4,8"], RUN_EVAL_STEPS),
    ],
)
def test_a_plan_has_the_evaluations_of_its_run_or_study(
    overrides: list[str], eval_steps: float | list[float]
) -> None:
    config, _ = compose_sweep(overrides, multirun=True)
    assert config.trainer.eval_steps == eval_steps


def test_a_config_of_plain_values_may_have_auto() -> None:
    config = compose_run([])
    values = config.to_dict()
    values["trainer"]["eval_steps"] = "auto"
    assert RunConfig.from_dict(values) == config


def test_a_study_evaluates_after_a_ninth_and_a_third_of_the_steps(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    ended = search(station, tiny_base, tmp_path, 1)
    assert ended.returncode == 0, ended.stderr
    assert eval_steps_of(tmp_path, 0) == STUDY_EVAL_STEPS
    lines = metrics_of(folder_of(tmp_path) / "trials" / "0")
    steps = [line["step"] for line in lines if "eval/loss" in line]
    assert steps == [0, 3, 7, 18]
    best = (folder_of(tmp_path) / "experiment" / "best.yaml").read_text()
    assert "0.1112" in best, "the winner again has its own evaluations"


def test_a_study_keeps_the_rungs_that_it_began_with(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    """As one from before `auto`, which has rungs at each quarter."""
    begun = search(station, tiny_base, tmp_path, 1, "trainer.eval_steps=0.25")
    assert begun.returncode == 0, begun.stderr
    ended = search(station, tiny_base, tmp_path, 2)
    assert ended.returncode == 0, ended.stderr
    assert eval_steps_of(tmp_path, 1) == 0.25
    changed = search(station, tiny_base, tmp_path, 3, "trainer.eval_steps=0.5")
    assert changed.returncode == 1
    assert "error: trainer.eval_steps=0.5: study s began with 0.25" in changed.stderr


def test_searched_rungs_begin_with_those_of_a_run(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    ended = search(
        station, tiny_base, tmp_path, 2, "trainer.eval_steps=choice(0.25,0.5)"
    )
    assert ended.returncode == 0, ended.stderr
    assert eval_steps_of(tmp_path, 0) == RUN_EVAL_STEPS
