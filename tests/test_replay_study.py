"""The replay of whole studies on recorded curves (benchmarks/replay_study.py)."""

import importlib
import math
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from finetune.config.paths import CONF

STEPS = range(2, 55, 2)
NOISE = 0.01
RATE = "optimizer.learning_rate"


def result_of(point: dict[str, Any]) -> float:
    """A result that depends on rank and rate: the best are 64 and 10^-2.8."""
    distance = math.log10(point[RATE]) + 2.8
    # Rates far above the best one diverge.
    divergence = 5 * max(0.0, distance - 0.3) ** 2
    return 2.5 + 0.1 * distance**2 - 0.02 * math.log2(point["lora.r"]) + divergence


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 configs of the default space, 20 of them with three seeds."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("curves") / "curves.csv"
    lines = [f"trial,seed,step,value,lora.r,lora.alpha,lora.dropout,{RATE}"]
    for trial in range(150):
        point = {
            "lora.r": draw.choice([4, 8, 16, 32, 64]),
            "lora.alpha": draw.choice([8, 16, 32, 64]),
            "lora.dropout": draw.uniform(0, 0.15),
            RATE: 10 ** draw.uniform(-4, -2),
        }
        if trial == 0:
            point = {"lora.r": 16, "lora.alpha": 16, "lora.dropout": 0, RATE: 1e-3}
        for seed in range(3 if trial < 20 else 1):
            luck = draw.gauss(0, NOISE)
            for step in STEPS:
                value = result_of(point) + 0.5 * (54 / step - 1) / 26 + luck
                columns = ",".join(str(point[name]) for name in point)
                lines.append(f"{trial},{seed},{step},{value},{columns}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        # The scripts import their neighbours.
        patch.syspath_prepend(CONF.parent / "benchmarks")
        yield importlib.import_module("replay_study")


def test_the_model_gives_curves_between_the_recorded_ones(
    script: ModuleType, curves: Path
) -> None:
    model = script.CurveModel(curves)
    assert model.learning_rate == 1e-3
    assert model.error < 2 * NOISE
    assert model.seed_error == pytest.approx(NOISE, rel=0.35)
    best = {"lora.r": 64, "lora.alpha": 16, "lora.dropout": 0.05, RATE: 10**-2.8}
    assert model.best == pytest.approx(result_of(best), abs=1.5 * NOISE)
    for rate in (3e-4, 1e-3, 3e-3):
        point = {**best, "lora.r": 32, RATE: rate}
        curve = model.curves_at(model.encode(point)[None])[0]
        assert curve[-1] == pytest.approx(result_of(point), abs=1.5 * NOISE)
        assert curve[0] - curve[-1] == pytest.approx(0.5, abs=1.5 * NOISE)


def test_the_model_takes_runs_that_diverged(
    script: ModuleType, curves: Path, tmp_path: Path
) -> None:
    """They end early, with nan, at a step without an evaluation."""
    rows = [line.split(",") for line in curves.read_text(encoding="utf-8").splitlines()]
    ends = [row for row in rows[1:] if row[2] == "54" and int(row[0]) >= 20]
    early, late = sorted(ends, key=lambda row: float(row[3]))[-2:]
    rows = [row for row in rows if row[0] != early[0] or int(row[2]) < 30]
    rows.remove(late)
    rows += [[*early[:2], "29", "nan", *early[4:]], [*late[:3], "nan", *late[4:]]]
    lines = [",".join(row) for row in rows]
    file = tmp_path / "curves.csv"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    model = script.CurveModel(file)
    assert math.isfinite(model.error)
    assert model.unit == pytest.approx(script.CurveModel(curves).unit, rel=0.02)


@pytest.mark.parametrize(
    ("line", "changed", "message"),
    [
        ("trial,", "lora.alpha|other", "no column lora.alpha"),
        ("trial,", "optimizer.learning_rate|rate", "no column optimizer.learning_rate"),
        ("149,0,54,", "149,0,54,|149,0,53,", "evaluations at the same steps"),
    ],
)
def test_curves_that_make_no_model_are_refused_in_one_line(
    script: ModuleType,
    curves: Path,
    tmp_path: Path,
    line: str,
    changed: str,
    message: str,
) -> None:
    before, after = changed.split("|")
    lines = curves.read_text(encoding="utf-8").splitlines()
    written = [
        text.replace(before, after) if text.startswith(line) else text for text in lines
    ]
    file = tmp_path / "curves.csv"
    file.write_text("\n".join(written) + "\n", encoding="utf-8")
    with pytest.raises(SystemExit) as refused:
        script.CurveModel(file)
    assert str(refused.value).startswith(str(file))
    assert message in str(refused.value)


def replayed(script: ModuleType, path: Path, *overrides: str, **task: Any) -> Any:
    values = {"slots": 1, "seed": 0, "evaluation": 0.0, **task}
    return script.replay_task(script.Task(path, overrides, **values))


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("evaluation", [0.0, 0.05])
def test_a_study_without_pruning_spends_one_run_for_each_trial(
    script: ModuleType, curves: Path, slots: int, evaluation: float
) -> None:
    history = replayed(
        script,
        curves,
        "hydra/sweeper/pruner=none",
        "trainer.eval_steps=0.25",
        trials=8,
        slots=slots,
        evaluation=evaluation,
    )
    assert history.total == pytest.approx(8)
    assert len(history.regrets) == 8
    assert min(history.regrets) >= 0


def test_the_first_trial_is_the_baseline(script: ModuleType, curves: Path) -> None:
    model = script.CurveModel(curves)
    baseline = {"lora.r": 16, "lora.alpha": 16, "lora.dropout": 0.0, RATE: 1e-3}
    result = model.curves_at(model.encode(baseline)[None])[0, -1]
    for seed in (0, 1):
        history = replayed(script, curves, trials=4, seed=seed)
        assert history.regrets[0] == pytest.approx((result - model.best) / model.unit)


def test_equal_seeds_give_equal_studies_and_luck(
    script: ModuleType, curves: Path
) -> None:
    first = replayed(script, curves, budget=8)
    assert replayed(script, curves, budget=8) == first
    assert replayed(script, curves, budget=8, seed=1) != first
    assert first.total <= 8
    longer = replayed(script, curves, budget=12)
    count = len(first.regrets)
    assert longer.regrets[:count] == first.regrets
    assert longer.regret_at(8) == first.regrets[-1]
    assert math.isnan(longer.regret_at(0.5))


def test_pruning_and_fewer_evaluations_leave_more_trials_for_a_budget(
    script: ModuleType, curves: Path
) -> None:
    def trials(*overrides: str) -> float:
        histories = [
            replayed(
                script,
                curves,
                "trainer.eval_steps=0.25",
                *overrides,
                budget=16,
                seed=seed,
                evaluation=0.05,
            )
            for seed in range(3)
        ]
        return float(np.mean([len(history.spent) for history in histories]))

    unpruned = "hydra/sweeper/pruner=none"
    assert trials(unpruned) == 16
    assert trials(unpruned, "trainer.eval_steps=0.5") == 17
    assert trials() < 16, "some are pruned"


def test_every_variant_is_a_config_of_the_project(script: ModuleType) -> None:
    for group in script.VARIANTS.values():
        for overrides in group.values():
            config = script.compose_study(tuple(overrides), 1e-3)
            assert config.rung_steps(54)[-1] == 54
    default = script.compose_study((), 2e-4)
    assert default.rung_steps(54) == [7, 19, 54]
    even = script.compose_study(("trainer.eval_steps=0.25",), 2e-4)
    assert even.rung_steps(54) == [14, 28, 42, 54]
    assert default.baseline[RATE] == 2e-4
