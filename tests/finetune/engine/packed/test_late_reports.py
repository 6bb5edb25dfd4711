"""Steps that are reported when the next one has been queued, as on a GPU: same runs, same stops.

A CPU computes at once what is queued, so here the order of reports alone is another.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.runs import (
    final,
    interrupt_and_resume,
    losses,
    saved_adapter,
    train_in_slots,
)

from finetune.config.schema import RunConfig
from finetune.engine.observer import Observer
from finetune.errors import Diverged
from finetune.run.context import RunContext
from finetune.run.run import run

Tiny = Callable[..., RunConfig]

SHORT = ("sample_prompts=[]", "trainer.max_steps=9")

RUNS = {
    "plain": ("trainer.eval_steps=0", "trainer.save_steps=0"),
    "evaluations": ("trainer.eval_steps=2", "trainer.save_steps=0.5"),
    "accumulation": ("trainer.gradient_accumulation_steps=2", "trainer.eval_steps=3"),
    "clipped": ("optimizer.max_grad_norm=0.01", "trainer.save_steps=4"),
    "tokens": ("trainer.max_tokens=3000", "trainer.eval_steps=0.5"),
    "optimizer": ("optimizer=adafactor", "trainer.eval_steps=4"),
}


@pytest.fixture
def reports_late(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes the banks of the further runs report late."""
    from finetune.engine.packed.bank import Bank

    create = Bank.__init__

    def create_late(self: Bank, *arguments: Any, **more: Any) -> None:
        create(self, *arguments, **more)
        self.is_asynchronous = True

    return lambda: monkeypatch.setattr(Bank, "__init__", create_late)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same(
    tiny: Tiny, tmp_path: Path, reports_late: Callable[[], None], name: str
) -> None:
    config = tiny(*SHORT, "lora.dropout=0.1", *RUNS[name])
    run(config, tmp_path / "at_once", RunContext(interactive=False))
    reports_late()
    run(config, tmp_path / "late", RunContext(interactive=False))
    assert losses(tmp_path / "late") == losses(tmp_path / "at_once")
    assert saved_adapter(tmp_path / "late").equal(saved_adapter(tmp_path / "at_once"))
    for key in ("train_tokens", "steps", "objective", "eval/loss"):
        assert final(tmp_path / "late").get(key) == final(tmp_path / "at_once").get(key)


@pytest.mark.parametrize(
    ("name", "step"), [*((name, 3) for name in RUNS), ("evaluations", 2), ("plain", 8)]
)
def test_a_run_goes_on_bit_for_bit(
    tiny: Tiny, tmp_path: Path, reports_late: Callable[[], None], name: str, step: int
) -> None:
    config = tiny(*SHORT, "lora.dropout=0.1", *RUNS[name])
    run(config, tmp_path / "whole", RunContext(interactive=False))
    reports_late()
    interrupt_and_resume(config, tmp_path / "resumed", step)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
    assert saved_adapter(tmp_path / "resumed").equal(saved_adapter(tmp_path / "whole"))


def test_slots_train_as_alone(
    tiny: Tiny, tmp_path: Path, reports_late: Callable[[], None]
) -> None:
    configs = [
        tiny(*SHORT, f"seed={seed}", f"trainer.eval_steps={seed + 2}")
        for seed in range(3)
    ]
    for number, config in enumerate(configs):
        run(config, tmp_path / f"alone{number}", RunContext(interactive=False))
    reports_late()
    together = train_in_slots(configs, tmp_path, 3)
    for number, folder in enumerate(together):
        alone = tmp_path / f"alone{number}"
        assert losses(folder) == pytest.approx(losses(alone), rel=1e-5)


def test_a_diverged_run_names_its_step(
    tiny: Tiny, tmp_path: Path, reports_late: Callable[[], None]
) -> None:
    config = tiny(*SHORT, "optimizer.learning_rate=1e30")
    messages = []
    for name in ("at_once", "late"):
        with pytest.raises(Diverged) as caught:
            run(config, tmp_path / name, RunContext(interactive=False))
        messages.append(str(caught.value))
        reports_late()
    assert messages[0] == messages[1]


def test_a_run_that_is_stopped_stops_after_the_step_that_was_queued(
    tiny: Tiny, tmp_path: Path, reports_late: Callable[[], None]
) -> None:
    class Stopping(Observer):
        def on_step(self, step: int) -> bool:
            return step == 4

    reports_late()
    config = tiny(*SHORT, "trainer.eval_steps=0", "trainer.save_steps=0")
    run(config, tmp_path / "run", RunContext(Stopping(), interactive=False))
    assert len(losses(tmp_path / "run")) == 5


def test_the_next_pass_is_queued_before_a_step_is_reported(
    tiny: Tiny, tmp_path: Path, reports_late: Callable[[], None], monkeypatch: Any
) -> None:
    from finetune.engine.packed.bank import Bank

    order: list[str] = []
    compute = Bank.forward_backward

    def recorded(self: Bank, requests: Any) -> Any:
        order.append("pass")
        return compute(self, requests)

    class Recording(Observer):
        def on_step(self, step: int) -> bool:
            order.append(f"step {step}")
            return False

    monkeypatch.setattr(Bank, "forward_backward", recorded)
    reports_late()
    config = tiny(
        "trainer.max_steps=4",
        "trainer.eval_steps=0",
        "trainer.save_steps=0",
        "sample_prompts=[]",
    )
    run(config, tmp_path / "run", RunContext(Recording(), interactive=False))
    # The last step is reported at once: nothing is queued behind it.
    assert order == ["pass", "pass", "step 1", "pass", "step 2", "pass", "step 3"]
