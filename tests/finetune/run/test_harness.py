"""Tasks of lm-evaluation-harness as metrics: names, documents, values, faults, both engines."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from support.commands import run_cli
from support.rows import chat
from support.runs import NONE, TRL, Tiny, final, train_in_slots, write_jsonl

from finetune.config.sections.evaluation import EvaluationSettings
from finetune.errors import ConfigError
from finetune.files.run_folder import RunFolder
from finetune.metrics import harness
from finetune.metrics.load import check_metrics, higher_is_better, load_metrics
from finetune.run.context import RunContext
from finetune.run.load import load_run
from finetune.run.run import run

QUIET = RunContext(interactive=False)
PACKED = "trainer.engine=packed"
DOCUMENTS = 11
NAME = "harness/parity"

CHOICES = """
task: parity
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Is {{{{number}}}} even?"
doc_to_choice: ["yes", "no"]
doc_to_target: "{{{{label}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
ROLLING = """
task: text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "The number {{{{number}}}} is a whole number."
metric_list:
  - {{metric: bits_per_byte, higher_is_better: false}}
"""
GENERATED = """
task: said
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{number}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - {{metric: exact_match}}
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with tasks, and their documents."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    file = tmp_path / "documents.jsonl"
    write_jsonl(file, [{"number": 7 * n, "label": n % 3 % 2} for n in range(DOCUMENTS)])
    for name, text in (
        ("parity", CHOICES),
        ("text", ROLLING),
        ("said", GENERATED),
    ):
        (folder / f"{name}.yaml").write_text(text.format(file=file))
    return folder


@pytest.fixture
def short(tiny: Tiny, tmp_path: Path, tasks: Path) -> Tiny:
    """Configs of short runs that are evaluated on tasks."""
    write_jsonl(tmp_path / "rows.jsonl", [chat(f"{n}?", "yes") for n in range(40)])

    def make(*overrides: str) -> Any:
        return tiny(
            NONE, f"dataset.path={tmp_path / 'rows.jsonl'}", "dataset.limit=null",
            "dataset.eval_fraction=0.1", "dataset.test_fraction=0.1", "trainer.max_steps=4",
            "trainer.eval_steps=2", "optimizer.learning_rate=1e-2", "sample_prompts=[]",
            f"evaluation.harness_path={tasks}", *overrides,
        )  # fmt: skip

    return make


def by_the_harness_itself(folder: Path, task: str, numbers: list[int]) -> Any:
    """Evaluate a finished run by the harness's own class for transformers' models."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    loaded = load_run(folder)
    model = loaded.with_adapter().eval()
    return simple_evaluate(
        HFLM(pretrained=model, tokenizer=loaded.tokenizer),
        tasks=[task],
        samples={task: numbers},
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=folder.parent / "tasks"),
    )


@pytest.mark.filterwarnings("ignore")
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
        expected = by_the_harness_itself(tmp_path / "run", "parity", numbers)
        values = expected["results"]["parity"]
        assert metrics[f"{split}/{NAME}"] == values["acc,none"]
        assert metrics[f"{split}/{NAME}/acc_norm"] == values["acc_norm,none"]
        expected = by_the_harness_itself(tmp_path / "run", "text", numbers)
        bits = expected["results"]["text"]["bits_per_byte,none"]
        assert metrics[f"{split}/harness/text"] == pytest.approx(bits, rel=1e-4)
    scores = json.loads((tmp_path / "run/test_rows.json").read_text())["scores"]
    assert scores[NAME]["row_counts"] == [1] * len(odd)
    assert sum(scores[NAME]["row_sums"]) / len(odd) == metrics[f"test/{NAME}"]
    assert scores["harness/text"]["row_sums"] == [], "no mean of documents"


@pytest.mark.filterwarnings("ignore")
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


@pytest.mark.filterwarnings("ignore")
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


@pytest.mark.filterwarnings("ignore")
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
    expected = by_the_harness_itself(tmp_path / "run", "parity", every)
    assert values[NAME] == expected["results"]["parity"]["acc,none"]


@pytest.mark.filterwarnings("ignore")
def test_a_direction_is_the_tasks_own(short: Tiny) -> None:
    config = short(f"evaluation.metrics=[{NAME},harness/text]")
    metrics = load_metrics(config.evaluation)
    names = [name for metric in metrics for name in metric.names]
    assert names == [NAME, f"{NAME}/acc_norm", "harness/text"]
    assert higher_is_better(f"eval/{NAME}", metrics)
    assert higher_is_better(f"eval/{NAME}/acc_norm", metrics)
    assert not higher_is_better("eval/harness/text", metrics)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["evaluation.metrics=[harness/parety]"],
            "evaluation.metrics=harness/parety: lm-evaluation-harness has no such task; "
            "did you mean parity",
        ),
        (
            ["evaluation.metrics=[harness/said]"],
            "evaluation.metrics=harness/said: is a task of generate_until; allowed: ",
        ),
        (
            ["evaluation.metrics=[harness/mmlu]"],
            "evaluation.metrics=harness/mmlu: is a group of tasks: name one of them",
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
    harness.load_task.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    settings = EvaluationSettings(metrics=["harness/arc_easy"])
    with pytest.raises(ConfigError, match=r'needs .*"qlora-sweeps\[harness\]"'):
        load_metrics(settings)
