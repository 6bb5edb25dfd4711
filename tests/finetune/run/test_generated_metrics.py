"""Metrics of generated answers in whole runs: names, rungs, faults, both engines."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from support.commands import Station
from support.rows import chat
from support.runs import NONE, TRL, Tiny, final, train_in_slots, write_jsonl

from finetune.errors import ConfigError
from finetune.files.run_folder import RunFolder
from finetune.run.context import RunContext
from finetune.run.run import run

QUIET = RunContext(interactive=False)


def rows(count: int, answer: str = "Yes") -> list[dict[str, Any]]:
    """Rows of one answer."""
    return [chat(f"Is {number} a number?", answer) for number in range(count)]


@pytest.fixture
def learnable(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """Configs of runs that learn to answer with one word, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_jsonl(tmp_path / "rows.jsonl", rows(60))

    def make(*overrides: str) -> Any:
        return tiny(
            NONE, "dataset.path=rows.jsonl", "dataset.limit=null", "dataset.eval_fraction=0.1",
            "dataset.test_fraction=0.1", "trainer.max_steps=24", "trainer.eval_steps=8",
            "optimizer.learning_rate=1e-2", "evaluation.max_new_tokens=2", "sample_prompts=[]",
            *overrides,
        )  # fmt: skip

    return make


@pytest.mark.parametrize("engine", ["trainer.engine=packed", TRL])
def test_exact_match_rises_and_is_the_objective(
    learnable: Tiny, tmp_path: Path, engine: str
) -> None:
    config = learnable("evaluation=exact_match", "objective=eval/exact_match", engine)

    objective = run(config, tmp_path / "run", QUIET)

    result = final(tmp_path / "run")
    lines = RunFolder(tmp_path / "run").metrics()
    values = [line["eval/exact_match"] for line in lines if "eval/exact_match" in line]
    assert values[0] == 0
    assert values[-1] == objective == 1
    assert result["objective"] == {"name": "eval/exact_match", "value": 1}
    assert result["metrics"]["test/exact_match"] == 1
    recorded = json.loads((tmp_path / "run/test_rows.json").read_text())
    score = recorded["scores"]["exact_match"]
    assert score["row_sums"] == [1] * result["rows"]["test"]


@pytest.mark.parametrize(
    ("every", "steps"), [(0, [24]), (1, [0, 8, 16, 24]), (2, [0, 16, 24])]
)
def test_answers_are_generated_at_the_rungs_that_every_names(
    learnable: Tiny, tmp_path: Path, every: int, steps: list[int]
) -> None:
    config = learnable("evaluation=exact_match", f"evaluation.every={every}")

    run(config, tmp_path / "run", QUIET)

    lines = RunFolder(tmp_path / "run").metrics()
    assert [line["step"] for line in lines if "eval/exact_match" in line] == steps
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 8, 16, 24]


def test_drawn_answers_are_the_same_again_and_do_not_depend_on_the_runs_seed(
    learnable: Tiny, tmp_path: Path
) -> None:
    (tmp_path / "answers.py").write_text(
        "def number(predictions, references, rows):\n"
        "    return [float(sum(map(ord, text))) for text in predictions]\n"
    )
    # A rate of next to nothing: the adapter stays that of the base, whatever its seed.
    overrides = ["evaluation.metrics=[answers.number]", "optimizer.learning_rate=1e-30"]
    drawn = [*overrides, "evaluation.temperature=2.0", "evaluation.max_new_tokens=8"]
    cases = {
        "greedy": overrides,
        "drawn": drawn,
        "other seed": [*drawn, "seed=1"],
        "likeliest": [*drawn, "evaluation.top_p=0.5"],
    }
    scores = {}
    for name, case in cases.items():
        run(learnable("trainer.max_steps=1", *case), tmp_path / name, QUIET)
        lines = RunFolder(tmp_path / name).metrics()
        scores[name] = [line["eval/number"] for line in lines if "eval/number" in line]

    assert scores["drawn"][0] == scores["drawn"][1]
    assert scores["other seed"] == scores["drawn"]
    assert scores["greedy"] != scores["drawn"]
    assert scores["likeliest"] != scores["drawn"]


def test_without_metrics_nothing_is_generated(
    learnable: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("generated")

    monkeypatch.setattr(
        "finetune.engine.packed.generation_pass.generate_tokens", refuse
    )

    run(learnable(), tmp_path / "run", QUIET)

    assert final(tmp_path / "run")["status"] == "completed"


def test_the_best_checkpoint_is_that_of_the_highest_score(
    learnable: Tiny, tmp_path: Path
) -> None:
    (tmp_path / "falling.py").write_text(
        "values = [0.1, 0.9, 0.5, 0.3, 0.2]\n"
        "def score(predictions, references, rows):\n"
        "    return [values.pop(0)] * len(rows)\n"
    )
    config = learnable(
        "evaluation.metrics=[falling.score]",
        "objective=eval/score",
        "objective_at=best",
    )

    assert run(config, tmp_path / "run", QUIET) == 0.9
    assert final(tmp_path / "run")["metrics"]["test/score"] == pytest.approx(0.2)


def test_each_source_has_loss_and_scores(learnable: Tiny, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "no.jsonl", rows(40, "No")[20:])
    config = learnable(
        "dataset.path=[rows.jsonl,no.jsonl]", "evaluation=exact_match",
        "objective=eval/no/exact_match", "trainer.max_steps=2", "dataset.split_seed=1",
    )  # fmt: skip

    run(config, tmp_path / "run", QUIET)

    metrics = final(tmp_path / "run")["metrics"]
    assert {name for name in metrics if name.startswith("eval/")} == {
        *("eval/loss", "eval/accuracy", "eval/exact_match"),
        *(
            f"eval/{source}/{name}"
            for source in ("rows", "no")
            for name in ("loss", "accuracy", "exact_match")
        ),
    }


def test_a_metric_that_raises_fails_its_run_with_the_row(
    learnable: Tiny, tmp_path: Path
) -> None:
    (tmp_path / "raising.py").write_text(
        "def score(predictions, references, rows):\n"
        "    if any('7' in str(row) for row in rows): raise KeyError('x')\n"
        "    return [1] * len(rows)\n"
    )
    write_jsonl(
        tmp_path / "eval.jsonl", [chat(f"Odd {n}?", "Yes") for n in range(5, 9)]
    )
    overrides = ("dataset.eval_path=eval.jsonl", "trainer.max_steps=2")
    good = learnable("trainer.max_steps=2")
    bad = learnable("evaluation.metrics=[raising.score]", *overrides)
    errors: dict[int, Exception] = {}

    train_in_slots([bad, good], tmp_path / "pack", slots=2, errors=errors)

    assert "eval.jsonl: row 3: KeyError" in str(errors[0])
    assert final(tmp_path / "pack/1")["status"] == "completed"


def test_a_function_that_waits_does_not_stop_the_other_slots(
    learnable: Tiny, tmp_path: Path
) -> None:
    (tmp_path / "waiting.py").write_text(
        "import threading\n"
        "other_has_ended = threading.Event()\n"
        "def score(predictions, references, rows):\n"
        "    return [float(other_has_ended.wait(60))] * len(rows)\n"
    )
    import waiting  # type: ignore[import-not-found]

    class Observer(QUIET.observer.__class__):  # type: ignore[name-defined,misc]
        def on_completed(self, metrics: Any) -> list[str]:
            waiting.other_has_ended.set()
            return []

    before = set(threading.enumerate())
    waits = learnable("evaluation.metrics=[waiting.score]", "trainer.max_steps=2")
    other = learnable("trainer.max_steps=6", "seed=1")

    folders = train_in_slots(
        [waits, other], tmp_path / "pack", slots=2, observers={1: Observer()}
    )

    assert final(folders[0])["metrics"]["eval/score"] == 1
    assert len(set(threading.enumerate()) - before) < 5


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("evaluation.metrics=[absent.score]",), "evaluation.metrics=absent.score: there is no module absent"),
        (("evaluation=exact_match", "dataset.path=text.jsonl"), "evaluation.metrics=[exact_match]: needs prompts with answers, which the held-out rows do not have (format text)"),
        (("evaluation.metrics=[math.fsum]", "objective=eval/f1"), "evaluation.metrics=math.fsum: must take (predictions, references, rows)"),
    ],
)  # fmt: skip
def test_what_no_run_can_score_is_refused_before_the_base_loads(
    learnable: Tiny,
    tmp_path: Path,
    overrides: tuple[str, ...],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_jsonl(tmp_path / "text.jsonl", [{"text": f"Text {n}"} for n in range(40)])

    def refuse(*_: object) -> None:
        raise AssertionError("the base is loaded")

    monkeypatch.setattr("finetune.model.loading.load_base", refuse)

    with pytest.raises(ConfigError) as error:
        run(learnable(*overrides), tmp_path / "run", QUIET)

    assert str(error.value).startswith(says)


def test_evaluate_writes_each_answer_with_its_scores(
    learnable: Tiny, tmp_path: Path, station: Station
) -> None:
    # The limit is of the run's own rows.
    limited = learnable("evaluation=exact_match", "evaluation.limit=2")
    run(limited, tmp_path / "run", QUIET)
    write_jsonl(tmp_path / "test.jsonl", [*rows(3), *rows(1, "No")])

    ended = station.run(
        "run", "--data", "test.jsonl", "--answers", "answers.jsonl", "--json",
        module="finetune.evaluate", cwd=tmp_path,
    )  # fmt: skip

    assert ended.returncode == 0, ended.stderr
    printed = json.loads(ended.stdout)
    assert printed["adapter"]["exact_match"] == 0.75
    assert printed["base"]["exact_match"] == 0
    lines = [
        json.loads(line)
        for line in (tmp_path / "answers.jsonl").read_text().splitlines()
    ]
    assert [line["scores"]["exact_match"] for line in lines] == [1, 1, 1, 0]
    assert (lines[3]["prediction"], lines[3]["reference"]) == ("Yes", "No")
    assert lines[3]["row"] == "test.jsonl: row 4"
