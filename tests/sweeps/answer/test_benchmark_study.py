"""Studies whose objective is a task of lm-evaluation-harness, from their rungs to their answers."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from optuna.trial import TrialState
from support.commands import Station
from support.configs import study_overrides
from support.rows import chat
from support.runs import final, write_jsonl

from sweeps.study.study import Study

DOCUMENTS = 240
HEAD = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "Is {{{{number}}}} a number?"
"""
GENERATED = """
output_type: generate_until
doc_to_target: "Yes"
generation_kwargs: {until: ["\\n"], max_gen_toks: 2}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
LIKELIHOOD = """
output_type: multiple_choice
doc_to_choice: ["Yes", "No"]
doc_to_target: 0
process_results: !function scoring.nats
metric_list:
  - {metric: nats, aggregation: mean, higher_is_better: false}
"""
SCORING = """
def nats(document, results):
    return {"nats": -results[0][0]}
"""
TASKS = {"answer": GENERATED, "likelihood": LIKELIHOOD}
DIRECTIONS = {"answer": "MAXIMIZE", "likelihood": "MINIMIZE"}


@dataclass(frozen=True)
class Made:
    """A study that has ended."""

    task: str
    place: Path
    """Its working directory."""

    @property
    def folder(self) -> Path:
        return self.place / "outputs" / "sweeps" / "s"

    @property
    def objective(self) -> str:
        return f"eval/harness/{self.task}"


@pytest.fixture(scope="module", params=TASKS)
def study(
    request: pytest.FixtureRequest,
    station: Station,
    tiny_base: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Made:
    """A study of four trials in two slots, some of which hardly learn."""
    pytest.importorskip("lm_eval")
    place = tmp_path_factory.mktemp("benchmark")
    rows = [chat(f"Is {number} a number?", "Yes") for number in range(260)]
    write_jsonl(place / "rows.jsonl", rows)
    documents = [{"number": 1000 + number} for number in range(DOCUMENTS)]
    file = write_jsonl(place / "documents.jsonl", documents)
    (place / "tasks").mkdir()
    (place / "tasks/scoring.py").write_text(SCORING)
    for name, text in TASKS.items():
        head = HEAD.format(name=name, file=file)
        (place / f"tasks/{name}.yaml").write_text(head + text)
    points = "[{optimizer.learning_rate: 1e-2},{optimizer.learning_rate: 1e-6}]"
    ended = station.run(
        *study_overrides(tiny_base, "s"), "dataset.path=rows.jsonl", "dataset.limit=null",
        "dataset.eval_fraction=5e-2", "dataset.test_fraction=5e-2",
        f"objective=harness/{request.param}", "evaluation.harness_path=tasks",
        "trainer.max_steps=24", "optimizer.warmup_ratio=0",
        "~search", "optimizer.learning_rate=tag(log,interval(1e-6,2e-2))",
        f"hydra.sweeper.start={points}", "hydra.sweeper.pruner.min_survivors=1",
        "hydra.sweeper.n_trials=4", "hydra.sweeper.slots=2", cwd=place,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return Made(request.param, place)


@pytest.mark.slow
def test_its_direction_rungs_and_pruning_are_the_tasks(study: Made) -> None:
    loaded = Study.load(study.folder)

    assert loaded.objectives == [study.objective]
    assert loaded.optuna.direction.name == DIRECTIONS[study.task]
    states = [trial.state for trial in loaded.trials()]
    assert set(states) == {TrialState.COMPLETE, TrialState.PRUNED}
    complete = [trial for trial in loaded.trials() if trial.value is not None]
    values = [trial.value for trial in complete if trial.value is not None]
    best = loaded.ranked()[0]
    assert best.value == (max(values) if study.task == "answer" else min(values))
    for trial in complete:
        lines = (study.folder / f"trials/{trial.number}/metrics.jsonl").read_text()
        logged = [
            line[study.objective]
            for line in map(json.loads, lines.splitlines())
            if study.objective in line
        ]
        # The base's evaluation is no rung.
        assert list(trial.intermediate_values.values()) == logged[1:]


@pytest.mark.slow
def test_its_answer_compares_the_documents_that_no_decision_has_seen(
    study: Made,
) -> None:
    answer = json.loads((study.folder / "answer.json").read_text())
    compared = answer["test"]["objective"]
    name = f"test/harness/{study.task}"
    winner = study.folder / "trials" / str(answer["trial"])

    assert compared["metric"] == name
    assert compared["winner"] == final(winner)["metrics"][name]
    low, high = compared["interval_95"]
    assert low <= compared["difference"] <= high
    assert compared["verdict"] == "better"
    recorded = json.loads((study.folder / "best/test_rows.json").read_text())
    scores = recorded["scores"][f"harness/{study.task}"]
    assert scores["row_counts"] == [1] * (DOCUMENTS // 2)
    assert name in (study.folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_its_winner_is_evaluated_on_all_documents(
    study: Made, station: Station
) -> None:
    best = str(study.folder / "best")
    arguments = (best, "--data", "rows.jsonl", "--json")
    ended = station.run(*arguments, cwd=study.place, module="finetune.evaluate")

    assert ended.returncode == 0, ended.stderr
    values = json.loads(ended.stdout)
    name = f"harness/{study.task}"
    base, adapter = values["base"][name], values["adapter"][name]
    assert adapter > base if study.task == "answer" else adapter < base


@pytest.mark.slow
def test_the_plan_of_such_a_study_counts_its_documents(
    study: Made, station: Station
) -> None:
    arguments = (
        f"objective=harness/{study.task}", "evaluation.harness_path=tasks",
        "dataset.path=rows.jsonl", "sample_prompts=[]",
    )  # fmt: skip
    ended = station.run(*arguments, cwd=study.place, module="finetune.plan")

    assert ended.returncode == 0, ended.stderr
    line = next(line for line in ended.stdout.splitlines() if "benchmarks" in line)
    assert line.split(":")[0].split()[-1] == str(DOCUMENTS)
