"""The plan of time: its arithmetic, and a measured run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import ConfigCompositionException
from support.commands import Station

from finetune.app import compose_run, compose_sweep
from finetune.engine.observer import Observer, Rung
from finetune.run.context import RunContext
from finetune.run.evaluation_work import STEP_TOKENS, Generation, Work
from finetune.run.resources import SharedResources
from finetune.run.run import run
from finetune.run.time_plan import (
    EVALUATION_PASSES,
    GENERATED_STEP_SECONDS,
    TRAINING_PASSES,
    TimePlan,
    plan_time,
)


class Split(list[int]):
    """A split of rows, each a length in tokens."""

    @property
    def lengths(self) -> list[int]:
        return list(self)


SPLITS: Any = {
    "train": Split([100] * 40),
    "eval": Split([50] * 20),
    "test": Split([10] * 30),
}
FIXED = [
    "trainer.max_steps=8",
    "trainer.per_device_eval_batch_size=8",
    "sample_max_new_tokens=5",
    "evaluation.max_new_tokens=7",
]


def planned(
    *overrides: str,
    is_gpu: bool = False,
    tasks: dict[str, Work] | None = None,
    **splits: Split,
) -> TimePlan:
    """Plan with a speed of a token a second in one pass."""
    config = compose_run([*FIXED, *overrides])
    return plan_time(config, {**SPLITS, **splits}, 1000, 10**6, 1e6, is_gpu, tasks)


def test_tokens_rungs_and_prompts_are_counted() -> None:
    plan = planned()
    assert plan.training == 1000 * TRAINING_PASSES
    assert plan.evaluations == 5
    assert plan.evaluation == pytest.approx(20 * 50 * EVALUATION_PASSES)
    assert plan.test == pytest.approx(30 * 10 * EVALUATION_PASSES)
    # Two held-out prompts.
    step = (STEP_TOKENS + 2) * EVALUATION_PASSES
    assert plan.answers == pytest.approx(5 * step)
    parts = plan.training + 5 * plan.evaluation + plan.test + 2 * plan.answers
    assert plan.run == pytest.approx(parts)


def test_a_step_of_generation_has_its_own_time_on_a_gpu() -> None:
    assert planned(is_gpu=True).answers == pytest.approx(5 * GENERATED_STEP_SECONDS)
    assert planned("sample_prompts=[]").answers == 0


def test_answers_are_generated_together_after_their_prompts() -> None:
    plan, without = planned("evaluation=exact_match"), planned()
    step = (STEP_TOKENS + 20) * EVALUATION_PASSES
    prompts = 20 * 50 * EVALUATION_PASSES
    assert plan.evaluation == without.evaluation
    assert plan.answering == pytest.approx(7 * step + prompts)
    assert without.answering == 0
    step = (STEP_TOKENS + 30) * EVALUATION_PASSES
    prompts = 30 * 10 * EVALUATION_PASSES
    assert plan.test - without.test == pytest.approx(7 * step + prompts)
    limited = planned("evaluation=exact_match", "evaluation.limit=3")
    step = (STEP_TOKENS + 3) * EVALUATION_PASSES
    prompts = 3 * 10 * EVALUATION_PASSES
    assert limited.test - without.test == pytest.approx(7 * step + prompts)
    on_gpu = planned("evaluation=exact_match", is_gpu=True)
    seconds = 7 * GENERATED_STEP_SECONDS + 20 * 50 * EVALUATION_PASSES
    assert on_gpu.answering == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("every", "answered", "later"), [(1, 5, 4), (0, 1, 1), (2, 3, 2)]
)
def test_evaluations_without_answers_are_counted_as_such(
    every: int, answered: int, later: int
) -> None:
    plan = planned("evaluation=exact_match", f"evaluation.every={every}")
    assert plan.answered == answered
    evaluations = 5 * plan.evaluation + answered * plan.answering
    assert plan.run == pytest.approx(plan.training + evaluations + plan.final)
    one, two = (plan.study(trials, seeds=0, workers=1)[1] for trials in (1, 2))
    trial = plan.training + 4 * plan.evaluation + later * plan.answering
    assert two - one == pytest.approx(trial)


def test_tasks_are_counted_with_the_documents_of_their_split() -> None:
    tasks = {
        "eval": Work(tokens=300, generations=(Generation(4, 6),)),
        "test": Work(tokens=500),
    }
    tasks_key = "evaluation.metrics=[harness/any]"
    plan, without = planned(tasks_key, tasks=tasks), planned()
    step = (STEP_TOKENS + 4) * EVALUATION_PASSES
    assert plan.answering == pytest.approx(300 * EVALUATION_PASSES + 6 * step)
    assert plan.test - without.test == pytest.approx(500 * EVALUATION_PASSES)


def test_without_held_out_rows_there_is_no_evaluation() -> None:
    plan = planned(eval=Split())
    assert plan.evaluations == 0
    assert plan.run == pytest.approx(plan.training + plan.final)


def test_a_study_evaluates_its_base_once_and_compares_on_the_test_rows() -> None:
    plan = TimePlan(training=100, evaluation=10, evaluations=5, test=20, answers=3)
    trial = 100 + 4 * 10
    final = 10 + 2 * 20 + 2 * 3
    assert plan.study(8, seeds=0, workers=1) == (4 * trial + final, 8 * trial + final)
    seeds = 2 * (trial + 20)
    _, most = plan.study(8, seeds=2, workers=2)
    assert most == (8 * trial + seeds) / 2 + final


def test_a_sweep_keeps_the_configs_own_values_of_searched_keys() -> None:
    words = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "lora.r=choice(4,8)"]
    config, sweeper = compose_sweep([*words, "seed=7"], multirun=True)
    assert (config.lora.r, config.seed) == (16, 7)
    assert sweeper["n_trials"] == 3
    assert compose_sweep(["lora=r64"])[1] == {}
    with pytest.raises(ConfigCompositionException, match="requires --multirun"):
        compose_sweep(words)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ([], "the run, after loading"),
        (["-m", "hydra/sweeper=optuna"], "the study of 8 trials"),
        (
            ["-m", "hydra/sweeper=optuna", "hydra.sweeper.timeout=3600"],
            "whole trials in the timeout",
        ),
    ],
)
def test_the_command_prints_runs_and_studies(
    more: list[str], line: str, station: Station, tmp_path: Path
) -> None:
    ended = station.run(*more, cwd=tmp_path, module="finetune.plan")
    assert ended.returncode == 0, ended.stderr
    assert line in ended.stdout
    assert ("the study" in ended.stdout) == bool(more)


def test_a_sweep_that_is_no_study_is_refused(station: Station, tmp_path: Path) -> None:
    ended = station.run("-m", "lora.r=4,8", cwd=tmp_path, module="finetune.plan")
    assert (ended.returncode, ended.stdout) == (1, "")
    message = "error: -m: plans a study; add hydra/sweeper=optuna, or leave out -m"
    assert ended.stderr.splitlines()[-1] == message


class Recorder(Observer):
    """Keeps the durations of the evaluations after the first step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_rung(self, rung: Rung) -> None:
        if rung.index > 0:
            self.seconds.append(rung.seconds)


@pytest.mark.matrix
def test_the_planned_shares_are_those_of_a_run(tmp_path: Path) -> None:
    """Shares, because a machine's speed changes between a plan and its run."""
    config = compose_run(
        ["trainer.max_steps=16", "trainer.eval_steps=8", "tracker=none"]
    )
    config = replace(config, sample_prompts=[])
    recorder, resources = Recorder(), SharedResources()
    run(
        config,
        tmp_path / "run",
        RunContext(observer=recorder, resources=resources, interactive=False),
    )
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    rows = resources.rows(config.dataset)
    splits = {
        "train": resources.tokens("train", rows.train, config),
        "eval": resources.tokens("eval", rows.evaluation, config),
        "test": resources.tokens("test", rows.test, config),
    }
    plan = plan_time(config, splits, result["train_tokens"], 10**8, 1e11, False)
    measured = min(recorder.seconds) / result["train_seconds"]
    assert 0.5 < plan.evaluation / plan.training / measured < 2
