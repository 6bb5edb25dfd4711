"""Tasks of lm-evaluation-harness that generate, groups of tasks, and chat templates."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.benchmarks import (
    DOCUMENTS,
    by_the_harness_itself,
)
from support.runs import TRL, Tiny, final, train_in_slots

from finetune.config.schema import RunConfig
from finetune.errors import ConfigError
from finetune.files.run_folder import RunFolder
from finetune.metrics.harness import load_benchmark
from finetune.metrics.load import check_metrics, higher_is_better, load_metrics
from finetune.run.context import RunContext
from finetune.run.harness import copy_benchmark
from finetune.run.harness_prompts import prompt_format
from finetune.run.resources import SharedResources
from finetune.run.run import run

QUIET = RunContext(interactive=False)
PACKED = "trainer.engine=packed"
EVEN, ODD = list(range(0, DOCUMENTS, 2)), list(range(1, DOCUMENTS, 2))
SAID = "evaluation.metrics=[harness/said]"
pytestmark = pytest.mark.filterwarnings("ignore")


def test_each_metric_and_filter_has_a_name_and_a_direction(short: Tiny) -> None:
    metrics = load_metrics(short(SAID).evaluation)
    names = {name: metric.task_metric for metric in metrics for name in metric.names}
    assert names == {
        "harness/said": "code,whole",
        "harness/said/letters": "letters,whole",
        "harness/said/code/word": "code,word",
        "harness/said/letters/word": "letters,word",
    }
    assert higher_is_better("eval/harness/said/code/word", metrics)
    assert not higher_is_better("eval/harness/said/letters", metrics)


@pytest.mark.parametrize("has_template", [True, False])
@pytest.mark.parametrize("engine", [PACKED, TRL])
def test_answers_are_those_of_the_harness(
    short: Tiny, tmp_path: Path, engine: str, has_template: bool
) -> None:
    template = f"evaluation.harness_chat_template={has_template}".lower()
    folder = tmp_path / "run"
    run(short(SAID, engine, template), folder, QUIET)

    metrics = final(folder)["metrics"]
    for split, numbers in (("eval", EVEN), ("test", ODD)):
        expected = by_the_harness_itself(
            folder, "said", {"said": numbers}, has_template
        )
        name = f"{split}/harness/said"
        assert metrics[name] == expected["code,whole"] > 0
        assert metrics[f"{name}/letters"] == expected["letters,whole"]
        assert metrics[f"{name}/code/word"] == expected["code,word"]
    scores = json.loads((folder / "test_rows.json").read_text())["scores"]
    sums = scores["harness/said"]["row_sums"]
    assert len(sums) == len(ODD)
    assert sum(sums) / len(ODD) == pytest.approx(metrics["test/harness/said"])
    assert sums != scores["harness/said/code/word"]["row_sums"]


def test_a_base_without_a_template_is_asked_plain_text(
    tiny: Tiny, tiny_base: Path, short: Tiny, tmp_path: Path
) -> None:
    base = tmp_path / "plain"
    base.mkdir()
    for file in tiny_base.iterdir():
        if file.name != "chat_template.jinja":
            (base / file.name).write_bytes(file.read_bytes())
    model = f"model.name_or_path={base}"
    run(short(SAID, model), tmp_path / "run", QUIET)

    expected = by_the_harness_itself(
        tmp_path / "run", "said", {"said": EVEN}, has_template=False
    )
    metrics = final(tmp_path / "run")["metrics"]
    assert metrics["eval/harness/said"] == expected["code,whole"]
    always = short(SAID, model, "evaluation.harness_chat_template=true")
    with pytest.raises(ConfigError) as refused:
        run(always, tmp_path / "refused", QUIET)
    line = (
        f"evaluation.harness_chat_template=true: {base} has no chat template; allowed:"
    )
    assert str(refused.value).startswith(line)


@pytest.mark.parametrize(
    ("overrides", "beginning"),
    [
        ([], "<|im_start|>system\nAnswer.<|im_end|>\n<|im_start|>user\n"),
        (
            ["evaluation.harness_system=Hm."],
            "<|im_start|>system\nHm.\n\nAnswer.<|im_end|>\n<|im_start|>user\n",
        ),
        (
            ["evaluation.harness_system=Hm.", "evaluation.harness_chat_template=false"],
            "Hm.\n\nAnswer.",
        ),
    ],
)
def test_prompts_have_their_system_turn_and_examples_as_turns(
    short: Tiny, overrides: list[str], beginning: str
) -> None:
    from finetune.run.harness_calls import build_requests
    from finetune.run.harness_model import HarnessModel

    config = short(SAID, *overrides)
    tokenizer = SharedResources().tokenizer(config.model)
    path = "harness/said"
    benchmark = load_benchmark(path, config.evaluation.harness_path)
    (task,) = copy_benchmark(benchmark).tasks.values()
    model = HarnessModel(path, tokenizer, prompt_format(config, tokenizer), 512)

    (request,) = build_requests(model, task, [3])

    text, _ = request.args
    assert text.startswith(beginning)
    turns = text.count("<|im_start|>")
    # System, two examples, the question, and the beginning of its answer.
    assert turns == (0 if "false" in "".join(overrides) else 1 + 2 * 2 + 1 + 1)


@pytest.fixture
def generations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of runs of each generation."""
    from finetune.engine.packed.bank import Bank

    counts: list[int] = []
    generate = Bank.generate

    def recorded(bank: Bank, requests: Any) -> Any:
        counts.append(len(requests))
        return generate(bank, requests)

    monkeypatch.setattr(Bank, "generate", recorded)
    return counts


def test_runs_in_slots_answer_together_and_as_each_alone(
    short: Tiny, tmp_path: Path, generations: list[int]
) -> None:
    metrics = "evaluation.metrics=[harness/parity,harness/said,harness/drawn]"
    configs = [short(metrics, PACKED, f"seed={seed}") for seed in (0, 1, 2)]
    train_in_slots(configs, tmp_path / "packed", 3)
    # The base once, then two rungs of two tasks; the last ones with test documents.
    assert generations[:6] == [1, 1, 3, 3, 3, 3]
    for number, config in enumerate(configs):
        run(config, tmp_path / f"alone{number}", QUIET)
        alone = RunFolder(tmp_path / f"alone{number}").metrics()
        packed = RunFolder(tmp_path / "packed" / str(number)).metrics()
        for name in ("eval/harness/said", "eval/harness/drawn", "eval/harness/parity"):
            of_alone = [line[name] for line in alone if name in line]
            assert [line[name] for line in packed if name in line] == of_alone


def test_drawn_answers_are_the_same_at_each_evaluation(
    short: Tiny, tmp_path: Path
) -> None:
    drawn = ["evaluation.metrics=[harness/drawn]", "optimizer.learning_rate=1e-30"]
    values = {}
    for name, more in (("one", "seed=0"), ("other", "dataset.split_seed=5")):
        run(short(*drawn, more), tmp_path / name, QUIET)
        lines = RunFolder(tmp_path / name).metrics()
        values[name] = {
            line["eval/harness/drawn"] for line in lines if "eval/harness/drawn" in line
        }
        assert len(values[name]) == 1
    assert values["one"] != values["other"]


@pytest.mark.parametrize("group", ["weighted", "even"])
def test_a_group_has_the_value_that_the_harness_defines(
    short: Tiny, tmp_path: Path, group: str
) -> None:
    folder = tmp_path / "run"
    config = short(f"evaluation.metrics=[harness/{group}]")
    run(config, folder, QUIET)

    name = f"harness/{group}"
    assert [metric.names for metric in load_metrics(config.evaluation)] == [
        (name,),
        (f"{name}/acc",),
    ]
    samples = {"parity": ODD, "few": [1, 3]}
    expected = by_the_harness_itself(folder, group, samples)
    metrics = final(folder)["metrics"]
    assert metrics[f"test/{name}"] == expected["acc_norm,none"]
    assert metrics[f"test/{name}/acc"] == expected["acc,none"]
    scores = json.loads((folder / "test_rows.json").read_text())["scores"]
    documents = len(ODD) + 2 if group == "weighted" else 0
    assert len(scores[name]["row_sums"]) == documents


def test_answers_that_leave_no_room_for_a_prompt_are_refused(
    short: Tiny, tmp_path: Path
) -> None:
    config = short("evaluation.metrics=[harness/long]")
    with pytest.raises(ConfigError, match=r"up to 100000 tokens .* positions"):
        run(config, tmp_path / "run", QUIET)


@pytest.mark.slow
def test_prompts_that_are_too_long_lose_their_beginnings(
    short: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = short("evaluation.metrics=[harness/wide]")
    run(config, tmp_path / "run", QUIET)

    expected = by_the_harness_itself(tmp_path / "run", "wide", {"wide": EVEN})
    metrics = final(tmp_path / "run")["metrics"]
    assert metrics["eval/harness/wide"] == expected["code,whole"]
    count = len(EVEN)
    line = f"harness/wide: the beginnings of {count} prompts are cut"
    assert line in caplog.text


@pytest.mark.parametrize(
    ("words", "metrics", "objectives"),
    [
        (["objective=harness/said"], ["harness/said"], ["eval/harness/said"]),
        (
            ["objective=harness/said/letters", "evaluation=exact_match"],
            ["exact_match", "harness/said"],
            ["eval/harness/said/letters"],
        ),
        (
            ["objective=[harness/said,eval/loss]", SAID],
            ["harness/said"],
            ["eval/harness/said", "eval/loss"],
        ),
    ],
)
def test_a_task_alone_is_an_objective(
    short: Callable[..., RunConfig],
    words: list[str],
    metrics: list[str],
    objectives: list[str],
) -> None:
    config = short(*words)
    assert config.evaluation.metrics == metrics
    assert config.objectives == objectives
    check_metrics(config)
