"""`hydra.sweeper.timeout` ends training early enough for the final evaluation."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.commands import Station
from support.configs import study_overrides
from support.studies import made_study
from support.study_folder import trials_of

from finetune.app import compose_run
from finetune.run.evaluation_work import Work
from sweeps.study.final_time import (
    CONCLUSION_SECONDS,
    estimate_final_seconds,
    record_final_seconds,
    reserved_seconds,
)

TASKS = {"eval": Work(), "test": Work()}


class Split(list[int]):
    """A split of rows, each a length in tokens."""

    @property
    def lengths(self) -> list[int]:
        return list(self)


def resources(**splits: list[int]) -> Any:
    """Hold the lengths of the splits' rows."""
    return SimpleNamespace(
        rows=lambda dataset: SimpleNamespace(evaluation="eval", test="test"),
        tokens=lambda name, rows, config: Split(splits[name]),
        task_work=lambda documents, config: TASKS[documents],
    )


@pytest.mark.parametrize(
    ("overrides", "is_gpu", "factor"),
    [
        # Twice three times as many tokens.
        (["sample_prompts=[]"], False, 6),
        # And twice 10 steps, of two prompts each.
        (["sample_max_new_tokens=10"], False, 6 + 2 * 10 * 82 / 800),
        # A step takes as long as one of two batches.
        (["sample_max_new_tokens=10"], True, 6 + 2 * 10 / 2),
        # An evaluation generates 20 tokens of all answers together, after their prompts.
        (
            [
                "sample_max_new_tokens=10",
                "evaluation=exact_match",
                "evaluation.max_new_tokens=20",
            ],
            False,
            2 * (4800 + 20 * 104 + 10 * 82) / (1600 + 20 * 88),
        ),
        (
            [
                "sample_max_new_tokens=10",
                "evaluation=exact_match",
                "evaluation.max_new_tokens=20",
            ],
            True,
            2 * (6 + 1 + 20 + 10) / (2 + 1 + 20),
        ),
    ],
)
def test_the_estimate_counts_rows_and_generated_steps(
    overrides: list[str], is_gpu: bool, factor: float
) -> None:
    config = compose_run([*overrides, "trainer.per_device_eval_batch_size=4"])
    splits = resources(eval=[100] * 8, test=[100] * 24)
    estimate = estimate_final_seconds(config, splits, 4.0, is_gpu, has_answers=True)
    assert estimate == pytest.approx(4 * factor + CONCLUSION_SECONDS)


def test_the_estimate_counts_what_the_measured_evaluation_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(TASKS, "eval", Work(tokens=200))
    monkeypatch.setitem(TASKS, "test", Work(tokens=400))
    config = compose_run(["sample_prompts=[]"])
    splits = resources(eval=[100] * 8, test=[100] * 24)
    for has_answers, factor in ((True, 2 * 2800 / 1000), (False, 2 * 2800 / 800)):
        estimate = estimate_final_seconds(config, splits, 4.0, False, has_answers)
        assert estimate == pytest.approx(4 * factor + CONCLUSION_SECONDS)


def test_the_lowest_estimate_counts_and_takes_half_of_the_time_at_most(
    tmp_path: Path,
) -> None:
    study = made_study(tmp_path / "s", [])
    assert reserved_seconds(study, 100.0) == 0.0
    for seconds in (40.0, 30.0, 35.0):
        record_final_seconds(study, seconds)
    assert reserved_seconds(study, 100.0) == 30.0
    assert reserved_seconds(study, 50.0) == 25.0


@pytest.mark.slow
def test_a_study_has_its_answer_when_its_time_ends(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    timeout = 50.0
    rows = [
        {"prompt": f"What is {number} + 1?", "completion": f"It is {number + 1}. " * 9}
        for number in range(1500)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    began = time.time()
    ended = station.run(
        *study_overrides(tiny_base, "s"),
        f"dataset.path={data}",
        "dataset.test_fraction=0.6",
        "dataset.eval_fraction=0.02",
        "trainer.max_steps=100",
        "hydra.sweeper.n_trials=null",
        f"hydra.sweeper.timeout={timeout}",
        cwd=tmp_path,
    )
    seconds = time.time() - began
    assert ended.returncode == 0, ended.stderr
    assert "out of time" in ended.stderr
    study = trials_of(tmp_path)
    last = max(
        trial.datetime_complete.timestamp()
        for trial in study
        if trial.datetime_complete is not None
    )
    answer = json.loads((tmp_path / "outputs/sweeps/s/answer.json").read_text())
    assert answer["test"]["rows"] > 500
    # The time counts from shortly after the command's start: without a reserve, training ends
    # after it.
    assert last - began < timeout
    assert seconds < timeout + 15
