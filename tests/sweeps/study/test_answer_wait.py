"""Runs of a pack generate answers together, although they ask at different times."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.runs import NONE, Tiny, final, train_in_slots, write_jsonl

from finetune.engine.observer import Observer, Rung
from finetune.files.run_folder import RunFolder
from finetune.run.context import RunContext
from finetune.run.resources import SharedResources
from finetune.run.run import run
from sweeps.study.answer_wait import answers_wait


@dataclass
class Base:
    """An executor whose last answers had 30 tokens."""

    answer_tokens: int = 30
    capacity: int | None = None

    def execute(self, requests: Any, host_work: Any = None) -> Any:
        raise NotImplementedError


@dataclass
class Ask:
    """A request of a run that asks for answers in so many rounds."""

    rounds_to_answers: int | None
    executor: Base


@pytest.mark.parametrize(
    ("distances", "wait"),
    [
        pytest.param([0], False, id="alone"),
        pytest.param([0, 0, 0], False, id="all ask"),
        pytest.param([0, None, None], False, id="no other run will ask"),
        pytest.param([5, 7], False, id="none asks"),
        pytest.param([0, 1], True, id="the other asks next"),
        pytest.param([0, 20], True, id="a wait of exactly a generation"),
        pytest.param([0, 21], False, id="a wait of more than a generation"),
        pytest.param([0, 0, 0, 13], True, id="three slots of four are idle"),
        pytest.param([0, 0, 0, 14], False, id="three slots of four are idle too long"),
        pytest.param([0, 400, 20, None], True, id="the nearest run counts"),
    ],
)
def test_answers_wait_as_long_as_a_generation_is_worth(
    distances: list[int | None], wait: bool
) -> None:
    base = Base()
    assert answers_wait([Ask(distance, base) for distance in distances]) is wait


@pytest.fixture
def learnable(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """Configs of runs that learn to answer with one word."""
    monkeypatch.chdir(tmp_path)
    words = ("red", "blue", "green")
    rows = [
        {
            "prompt": f"Item {number}: {words[number % 3]}?",
            "completion": words[number % 3],
        }
        for number in range(60)
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)

    def make(*overrides: str) -> Any:
        return tiny(
            NONE, "dataset.path=rows.jsonl", "dataset.limit=null", "dataset.eval_fraction=0.1",
            "dataset.test_fraction=0.1", "trainer.max_steps=12", "trainer.eval_steps=4",
            "optimizer.learning_rate=1e-2", "evaluation=exact_match",
            "evaluation.max_new_tokens=12", "sample_prompts=[]", *overrides,
        )  # fmt: skip

    return make


@pytest.fixture
def generations(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The seeds of the runs of each generation."""
    from finetune.engine.packed.bank import Bank

    seeds: list[list[int]] = []
    generate = Bank.generate

    def recorded(bank: Bank, requests: Any) -> Any:
        seeds.append(sorted(request.slot.seed for request in requests))
        return generate(bank, requests)

    monkeypatch.setattr(Bank, "generate", recorded)
    return seeds


def evaluations(folder: Path) -> list[tuple[int, float, float]]:
    return [
        (
            line["step"],
            line["eval/exact_match"],
            pytest.approx(line["eval/loss"], rel=1e-4),
        )
        for line in RunFolder(folder).metrics()
        if "eval/exact_match" in line
    ]


# The last number: without waiting there are 15, 9, 14, 12 and 11 generations.
PACKS = {
    "runs of other lengths": (
        [f"trainer.max_steps={steps}" for steps in (12, 16, 20)],
        ["trainer.eval_steps=0.25"],
        3,
        7,
    ),
    "accumulated batches": (
        [f"trainer.gradient_accumulation_steps={count}" for count in (1, 2, 1)],
        [],
        3,
        6,
    ),
    "runs that begin late": (
        [f"trainer.max_steps={steps}" for steps in (6, 12, 12, 12, 12)],
        [],
        3,
        10,
    ),
    "four slots, evaluated at other steps": (
        [f"trainer.eval_steps={steps}" for steps in (3, 4, 5, 6)],
        [],
        4,
        7,
    ),
    "answers at some evaluations alone": (
        [f"evaluation.every={every}" for every in (0, 1, 2, 1)],
        ["trainer.eval_steps=3"],
        4,
        7,
    ),
}


@pytest.mark.parametrize(
    ("single", "common", "slots", "most"), PACKS.values(), ids=PACKS
)
def test_runs_of_other_lengths_answer_together_and_as_alone(
    learnable: Tiny,
    tmp_path: Path,
    generations: list[list[int]],
    single: list[str],
    common: list[str],
    slots: int,
    most: int,
) -> None:
    configs = [
        learnable(override, *common, f"seed={seed}")
        for seed, override in enumerate(single)
    ]

    folders = train_in_slots(configs, tmp_path / "pack", slots)

    in_pack = list(generations)
    for number, (config, folder) in enumerate(zip(configs, folders, strict=True)):
        alone = tmp_path / f"alone-{number}"
        run(config, alone, RunContext(interactive=False, evaluate_test_rows=False))
        assert evaluations(folder) == evaluations(alone)
    assert len(in_pack) <= most, in_pack


class Pruning(Observer):
    """Prunes a run at a rung."""

    def should_prune(self, rung: Rung) -> bool:
        return rung.step == 4


def test_nobody_waits_for_a_run_that_is_pruned_diverges_or_fails(
    learnable: Tiny, tmp_path: Path, generations: list[list[int]]
) -> None:
    configs = [
        learnable("seed=0", "trainer.eval_steps=5"),
        learnable("seed=1"),
        learnable("seed=2", "optimizer.learning_rate=1e30", "trainer.eval_steps=6"),
        learnable("seed=3", "trainer.eval_steps=6"),
    ]
    errors: dict[int, Exception] = {}

    folders = train_in_slots(
        configs,
        tmp_path / "pack",
        4,
        SharedResources(),
        observers={1: Pruning()},
        errors=errors,
    )

    assert list(errors) == [2]
    statuses = [final(folder)["status"] for folder in folders]
    assert statuses == ["completed", "pruned", "failed", "completed"]
    for seed in (0, 3):
        assert sum(seed in seeds for seeds in generations) >= 2
