"""The types of the API for a user's type checker: `make check` runs mypy on this file too."""

from pathlib import Path
from typing import Any, assert_type

import finetune
import sweeps


def use_runs() -> None:
    run = finetune.train("lora.r=8", "seed=1")
    assert_type(run, finetune.Run)
    assert_type(finetune.load("latest"), finetune.Run)
    assert_type(finetune.load(run.path), finetune.Run)
    assert_type(run.path, Path)
    assert_type(run.metrics, dict[str, float])
    assert_type(run.objective, float | tuple[float, ...] | None)
    assert_type(run.generate(["a"], max_new_tokens=8), list[str])
    result = run.evaluate("test.jsonl")
    assert_type(result, finetune.EvaluationResult)
    assert_type(result["adapter"]["loss"], float)
    assert_type(run.merge("merged").path, Path)


def use_studies() -> None:
    study = sweeps.search("study=s1")
    assert_type(study, sweeps.Study)
    assert_type(sweeps.load_study("s1"), sweeps.Study)
    assert_type(study.best, sweeps.Winner)
    assert_type(study.best.path, Path)
    assert_type(study.best.params, dict[str, Any])
    assert_type(study.best.value, float | tuple[float, ...])
    assert_type(study.best.generate(["a"]), list[str])
    assert_type(study.report(), Path)
    assert_type(study.confirm(top=1, seeds=2), dict[str, Any])


def wrong_uses(run: finetune.Run) -> None:
    """Each is an error: mypy reports an `ignore` that is not needed."""
    finetune.train(["lora.r=8"])  # type: ignore[arg-type]
    finetune.trian()  # type: ignore[attr-defined]
    run.merge()  # type: ignore[call-arg]
    sweeps.searches  # type: ignore[attr-defined]  # noqa: B018
