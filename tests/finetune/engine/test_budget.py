"""Budgets in tokens and minutes: where training ends, and what the learning rate follows."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.runs import Tiny, final, interrupt_and_resume, losses, train_in_slots

from finetune.config.schema import RunConfig
from finetune.engine.budget import Budget
from finetune.engine.checkpoint import Progress
from finetune.engine.schedule import step_batches, total_steps
from finetune.errors import ConfigError
from finetune.run.context import RunContext
from finetune.run.memory_plan import plan_memory
from finetune.run.resources import SharedResources
from finetune.run.run import run

SHORT = (
    "trainer.eval_steps=0.25",
    "trainer.save_steps=0",
    "sample_prompts=[]",
    "quantization=none",
    "dataset.eval_fraction=0.2",
)
TOKENS = (*SHORT, "trainer.num_train_epochs=9", "trainer.max_tokens=2000")
ENDLESS = (*SHORT, "trainer.max_steps=1000000", "dataset.max_length=64")
ENGINES = ["packed", "trl"]


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def logged(folder: Path, name: str) -> dict[int, float]:
    """A metric by its step."""
    return {row["step"]: row[name] for row in metrics(folder) if name in row}


def step_tokens(config: RunConfig) -> list[int]:
    """The tokens of each step without a limit."""
    resources = SharedResources()
    rows = resources.rows(config.dataset)
    lengths = resources.tokens("train", rows.train, config).lengths
    steps = step_batches(lengths, config, 10_000)
    return [
        sum(lengths[index] for batch in step.batches for index in batch)
        for step in itertools.islice(steps, 100)
    ]


def test_training_ends_with_the_step_that_reaches_the_tokens(
    tiny: Tiny, tmp_path: Path
) -> None:
    for engine in ENGINES:
        config = tiny(*TOKENS, f"trainer.engine={engine}")
        run(config, tmp_path / engine, RunContext(interactive=False))
        result = final(tmp_path / engine)
        sums = list(itertools.accumulate(step_tokens(config)))
        steps = next(n for n, tokens in enumerate(sums, 1) if tokens >= 2000)
        assert result["train_tokens"] == sums[steps - 1]
        rates = logged(tmp_path / engine, "train/learning_rate")
        assert len(rates) == steps
        # The cosine of the share of tokens before the step, after the warm-up.
        warmup = math.ceil(0.05 * steps)
        for number in range(warmup + 1, steps + 1):
            position = sums[number - 2] / 2000 * steps
            share = (position - warmup) / (steps - warmup)
            expected = 1e-3 * 0.5 * (1 + math.cos(math.pi * share))
            assert rates[number] == pytest.approx(expected, rel=1e-6)
        evaluated = logged(tmp_path / engine, "eval/loss")
        assert next(iter(evaluated)) == 0
        assert list(evaluated)[-1] == steps
        assert plan_memory(config, SharedResources()).train_tokens == sums[steps - 1]
    assert losses(tmp_path / "packed") == pytest.approx(
        losses(tmp_path / "trl"), rel=1e-5
    )


def test_a_slot_has_its_budget(tiny: Tiny, tmp_path: Path) -> None:
    configs = [
        tiny(*TOKENS, "seed=1"),
        tiny(*TOKENS, "trainer.max_tokens=900"),
        tiny(*SHORT, "trainer.max_steps=9"),
    ]
    together = train_in_slots(configs, tmp_path, len(configs))
    for number, config in enumerate(configs):
        alone = tmp_path / f"alone{number}"
        run(config, alone, RunContext(interactive=False))
        assert losses(together[number]) == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_with_a_limit_of_tokens_goes_on_bit_for_bit(
    tiny: Tiny, tmp_path: Path, engine: str
) -> None:
    config = tiny(*TOKENS, f"trainer.engine={engine}")
    run(config, tmp_path / "whole", RunContext(interactive=False))
    interrupt_and_resume(config, tmp_path / "resumed", step=3)
    rates = [
        logged(tmp_path / name, "train/learning_rate") for name in ("whole", "resumed")
    ]
    assert rates[0] == rates[1]
    assert losses(tmp_path / "whole") == losses(tmp_path / "resumed")


@pytest.fixture
def steady_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step is counted as a tenth of a second, however busy the machine is."""
    add_step = Progress.add_step

    def add(
        self: Progress, step: int, loss: float, tokens: int, seconds: float
    ) -> None:
        add_step(self, step, loss, tokens, 0.1)

    monkeypatch.setattr(Progress, "add_step", add)


@pytest.mark.usefixtures("steady_steps")
@pytest.mark.parametrize("engine", ENGINES)
def test_training_ends_with_the_step_that_reaches_the_minutes(
    tiny: Tiny, tmp_path: Path, engine: str
) -> None:
    config = tiny(*ENDLESS, "trainer.max_minutes=0.02", f"trainer.engine={engine}")
    run(config, tmp_path, RunContext(interactive=False))
    result = final(tmp_path)
    assert result["status"] == "completed"
    seconds = result["metrics"]["train/seconds"]
    assert 1.2 <= seconds < 2.4
    rates = logged(tmp_path, "train/learning_rate")
    assert list(rates) == list(range(1, len(rates) + 1))
    assert 3 < len(rates) < 1000
    last = rates[len(rates)]
    assert last < 0.3 * max(rates.values())
    evaluated = list(logged(tmp_path, "eval/loss"))
    assert evaluated[0] == 0
    assert evaluated[-1] == len(rates)
    # At the quarters of the time; two of them may fall into one step.
    assert 3 <= len(evaluated) <= 5


@pytest.mark.slow
@pytest.mark.usefixtures("steady_steps")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_counts_the_minutes_before(
    tiny: Tiny, tmp_path: Path, engine: str
) -> None:
    config = tiny(*ENDLESS, "trainer.max_minutes=0.02", f"trainer.engine={engine}")
    interrupt_and_resume(config, tmp_path, step=3)
    rates = logged(tmp_path, "train/learning_rate")
    assert list(rates) == list(range(1, len(rates) + 1))
    assert 1.2 <= final(tmp_path)["metrics"]["train/seconds"] < 2.4


@pytest.mark.slow
def test_a_run_killed_after_its_last_minute_trains_no_more(
    tiny: Tiny, tmp_path: Path
) -> None:
    """The checkpoint of its last step is there, its result is not."""
    config = tiny(*ENDLESS, "trainer.max_minutes=0.01", "trainer.save_steps=1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.run.run._remove_checkpoints", lambda *_: None)
        run(config, tmp_path, RunContext(interactive=False))
    (tmp_path / "result.json").unlink()
    before = logged(tmp_path, "train/learning_rate")
    run(config, tmp_path, RunContext(interactive=False))
    assert logged(tmp_path, "train/learning_rate") == before
    assert final(tmp_path)["status"] == "completed"


def test_the_largest_share_counts(tiny: Tiny) -> None:
    trainer = tiny("trainer.max_tokens=1000", "trainer.max_minutes=10").trainer
    budget = Budget(trainer, total=20, unlimited=100)

    def position(step: int, tokens: int, seconds: float) -> float:
        return budget.position(
            Progress(step=step, train_tokens=tokens, train_seconds=seconds)
        )

    assert position(50, 100, 0) == 10
    assert position(10, 400, 0) == 8
    assert position(10, 400, 540) == 18
    assert position(10, 400, 900) == 20
    assert not budget.is_spent(Progress(step=19, train_seconds=599))
    assert budget.is_spent(Progress(step=19, train_seconds=600))
    assert budget.is_spent(Progress(step=20))


def test_no_limit_ends_earlier_than_the_epochs(tiny: Tiny) -> None:
    config = tiny("trainer.max_tokens=1000000", "trainer.num_train_epochs=2")
    assert total_steps(config, [10] * 40) == 20


@pytest.mark.parametrize(
    "override",
    ["trainer.max_tokens=0", "trainer.max_minutes=-0.5", "trainer.max_tokens=1.5"],
)
def test_refuses_in_one_line(tiny: Tiny, override: str) -> None:
    with pytest.raises(ConfigError) as refused:
        tiny(override)
    assert str(refused.value).startswith(f"{override}: must be")
