"""Tasks of lm-evaluation-harness as metrics: names, documents, values, faults, both engines."""

import importlib.util
import json
from pathlib import Path

import pytest
from support.benchmarks import (
    DOCUMENTS,
    by_the_harness_itself,
)
from support.commands import run_cli
from support.runs import TRL, Tiny, final, train_in_slots

from finetune.config.sections.evaluation import EvaluationSettings
from finetune.errors import ConfigError
from finetune.files.run_folder import RunFolder
from finetune.metrics import harness
from finetune.metrics.load import check_metrics, higher_is_better, load_metrics
from finetune.run.context import RunContext
from finetune.run.run import run

QUIET = RunContext(interactive=False)
PACKED = "trainer.engine=packed"
NAME = "harness/parity"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("engine", [PACKED, TRL])
def test_values_are_those_of_the_harness_on_documents_that_no_decision_has_used(
    short: Tiny, tmp_path: Path, engine: str
) -> None:
    config = short(
        f"evaluation.metrics=[{NAME},harness/text]", f"objective=eval/{NAME}", engine
    )
    objective = run(config, tmp_path / "run", QUIET)

    lines = RunFolder(tmp_path / "run").metrics()
    steps = [line["step"] for line in lines if f"eval/{NAME}" in line]
    assert steps == [0, 2, 4]
    metrics = final(tmp_path / "run")["metrics"]
    assert metrics[f"eval/{NAME}"] == objective
    even, odd = list(range(0, DOCUMENTS, 2)), list(range(1, DOCUMENTS, 2))
    for split, numbers in (("eval", even), ("test", odd)):
        folder = tmp_path / "run"
        values = by_the_harness_itself(folder, "parity", {"parity": numbers})
        assert metrics[f"{split}/{NAME}"] == values["acc,none"]
        assert metrics[f"{split}/{NAME}/acc_norm"] == values["acc_norm,none"]
        values = by_the_harness_itself(folder, "text", {"text": numbers})
        bits = values["bits_per_byte,none"]
        assert metrics[f"{split}/harness/text"] == pytest.approx(bits, rel=1e-4)
    scores = json.loads((tmp_path / "run/test_rows.json").read_text())["scores"]
    assert scores[NAME]["row_counts"] == [1] * len(odd)
    assert sum(scores[NAME]["row_sums"]) / len(odd) == metrics[f"test/{NAME}"]
    assert scores["harness/text"]["row_sums"] == [], "no mean of documents"


def test_runs_in_slots_have_the_values_that_each_has_alone(
    short: Tiny, tmp_path: Path
) -> None:
    overrides = (f"evaluation.metrics=[{NAME},harness/text]", PACKED)
    configs = [short(*overrides, f"seed={seed}") for seed in (0, 1)]
    train_in_slots(configs, tmp_path / "packed", 2)
    for number, config in enumerate(configs):
        run(config, tmp_path / f"alone{number}", QUIET)
        alone = final(tmp_path / f"alone{number}")["metrics"]
        packed = final(tmp_path / "packed" / str(number))["metrics"]
        for name in (f"eval/{NAME}", "eval/harness/text", f"test/{NAME}"):
            assert packed[name] == pytest.approx(alone[name], abs=1e-5)


def test_a_limit_takes_the_first_documents_of_each_part(
    short: Tiny, tmp_path: Path
) -> None:
    run(
        short(f"evaluation.metrics=[{NAME}]", "evaluation.limit=2", PACKED),
        tmp_path / "run",
        QUIET,
    )
    scores = json.loads((tmp_path / "run/test_rows.json").read_text())["scores"]
    assert scores[NAME]["row_counts"] == [1, 1]


def test_a_finished_run_is_evaluated_on_all_documents(
    short: Tiny, tmp_path: Path
) -> None:
    run(short(f"evaluation.metrics=[{NAME}]"), tmp_path / "run", QUIET)
    ended = run_cli(
        "run",
        "--data",
        "rows.jsonl",
        "--json",
        cwd=tmp_path,
        module="finetune.evaluate",
    )
    assert ended.returncode == 0, ended.stderr
    values = json.loads(ended.stdout)["adapter"]
    every = list(range(DOCUMENTS))
    expected = by_the_harness_itself(tmp_path / "run", "parity", {"parity": every})
    assert values[NAME] == expected["acc,none"]


def test_a_direction_is_the_tasks_own(short: Tiny) -> None:
    config = short(f"evaluation.metrics=[{NAME},harness/text]")
    metrics = load_metrics(config.evaluation)
    names = [name for metric in metrics for name in metric.names]
    assert names == [NAME, f"{NAME}/acc_norm", "harness/text"]
    assert higher_is_better(f"eval/{NAME}", metrics)
    assert higher_is_better(f"eval/{NAME}/acc_norm", metrics)
    assert not higher_is_better("eval/harness/text", metrics)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["evaluation.metrics=[harness/parety]"],
            "evaluation.metrics=harness/parety: lm-evaluation-harness has no such task; "
            "did you mean parity",
        ),
        (
            ["evaluation.metrics=[harness/parity]", "evaluation.harness_path=nowhere"],
            "evaluation.harness_path=nowhere: there is no such folder",
        ),
        (
            ["evaluation.metrics=[harness/beams]"],
            "evaluation.metrics=harness/beams: its generation_kwargs have num_beams=4; allowed: "
            "until, max_gen_toks, do_sample, temperature, top_p",
        ),
        (
            ["evaluation.metrics=[harness/hot]"],
            "evaluation.metrics=harness/hot: its generation_kwargs have do_sample=true; needs",
        ),
        (
            ["evaluation.metrics=[harness/code]"],
            "evaluation.metrics=harness/code: runs the code that a model has generated",
        ),
        (
            ["evaluation.metrics=[harness/mixed]"],
            "evaluation.metrics=harness/mixed: is a group of 2 tasks, for which "
            "lm-evaluation-harness defines no value (aggregate_metric_list); name some of them: "
            "harness/parity, harness/said (lm-eval ls subtasks",
        ),
        (
            ["evaluation.metrics=[harness/numbers]"],
            "evaluation.metrics=harness/numbers: is a tag of 1 tasks, which has no value; name "
            "some of them: harness/few (lm-eval ls subtasks",
        ),
        (
            [f"evaluation.metrics=[{NAME}]", f"objective=eval/{NAME}/f1"],
            f"objective=eval/{NAME}/f1: ",
        ),
        ([f"objective=eval/{NAME}"], f"objective=eval/{NAME}: "),
    ],
)
def test_a_fault_is_one_line(short: Tiny, overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_metrics(short(*overrides))
    assert str(refused.value).startswith(line)
    assert "\n" not in str(refused.value)


def test_without_its_package_a_task_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    harness.load_benchmark.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    settings = EvaluationSettings(metrics=["harness/arc_easy"])
    with pytest.raises(ConfigError, match=r'needs .*"qlora-sweeps\[harness\]"'):
        load_metrics(settings)
