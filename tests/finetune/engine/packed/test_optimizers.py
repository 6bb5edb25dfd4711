"""Each optimizer of transformers in a slot: as TRL trains with it, as alone, and resumed."""

import typing
from pathlib import Path
from typing import Any

import pytest
from support.matrix import further
from support.runs import (
    Tiny,
    interrupt_and_resume,
    losses,
    saved_adapter,
    train_in_slots,
)

from finetune.config.sections.optimizer import OptimizerName
from finetune.errors import ConfigError
from finetune.run.context import RunContext
from finetune.run.run import run

STEPS = 20
SHORT = (
    f"trainer.max_steps={STEPS}",
    "trainer.eval_steps=0",
    "trainer.save_steps=0",
    "sample_prompts=[]",
    "optimizer.weight_decay=0.1",
    # Matrices of more than 4096 elements, which bitsandbytes keeps in 8 bits.
    "lora.r=72",
)
SETTINGS: dict[str, tuple[str, ...]] = {
    name: (f"optimizer.name={name}",) for name in typing.get_args(OptimizerName)
}
SETTINGS |= {
    "sgd with momentum": (
        "optimizer.name=sgd",
        "+trainer.extra.optim_args='momentum=0.9'",
    ),
    "LoRA+": ("optimizer.lora_plus_ratio=8",),
    "LoRA+ lion": ("optimizer.name=lion_32bit", "optimizer.lora_plus_ratio=8"),
}
OFTEN = ("adamw_8bit", "adafactor", "LoRA+")
"""Tested always; the others are slow."""

SOMETIMES = ("adamw_torch", "paged_lion_8bit", "ademamix", "rmsprop_bnb", "sgd")
"""Of the slow ones, those that are trained in CI: one of each kind."""


def each(*marks: pytest.MarkDecorator) -> list[Any]:
    """All settings; those that are not tested often have marks."""
    return [
        pytest.param(name, marks=() if name in OFTEN else marks) for name in SETTINGS
    ]


@pytest.mark.parametrize(
    "name",
    [
        *OFTEN,
        *(pytest.param(name, marks=pytest.mark.slow) for name in SOMETIMES),
        *further(*(name for name in SETTINGS if name not in OFTEN + SOMETIMES)),
    ],
)
def test_trains_as_with_trl(tiny: Tiny, tmp_path: Path, name: str) -> None:
    for engine in ("trl", "packed"):
        config = tiny(*SHORT, *SETTINGS[name], f"trainer.engine={engine}")
        run(config, tmp_path / engine)
    assert len(losses(tmp_path / "packed")) == STEPS
    assert losses(tmp_path / "packed") == pytest.approx(
        losses(tmp_path / "trl"), rel=1e-5
    )


def test_slots_with_other_optimizers_train_as_alone(tiny: Tiny, tmp_path: Path) -> None:
    names = ("adafactor", "adamw_8bit", "LoRA+", "adamw_torch")
    dropout = "lora.dropout=0.1"
    configs = [
        tiny(*SHORT, *SETTINGS[name], dropout, f"seed={seed}")
        for seed, name in enumerate(names)
    ]
    together = train_in_slots(configs, tmp_path, len(configs))
    for number, config in enumerate(configs):
        alone = tmp_path / f"alone{number}"
        run(config, alone, RunContext(interactive=False))
        assert losses(together[number]) == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.parametrize("name", each(pytest.mark.matrix))
def test_goes_on_bit_for_bit(tiny: Tiny, tmp_path: Path, name: str) -> None:
    config = tiny(*SHORT, *SETTINGS[name], "trainer.max_steps=6")
    run(config, tmp_path / "whole", RunContext(interactive=False))
    interrupt_and_resume(config, tmp_path / "resumed", step=3)
    whole, resumed = (
        saved_adapter(tmp_path / "whole"),
        saved_adapter(tmp_path / "resumed"),
    )
    assert whole.equal(resumed)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")


@pytest.mark.parametrize("name", each(pytest.mark.slow))
def test_the_plan_counts_the_state(tiny: Tiny, name: str) -> None:
    """Against the state of an optimizer of a whole adapter after a step."""
    from finetune.engine.packed.gradient_norms import GradientNorm
    from finetune.engine.packed.optimizer import SlotOptimizer
    from finetune.run.memory_plan import plan_memory
    from finetune.run.resources import SharedResources

    config = tiny(*SHORT, *SETTINGS[name], "trainer.gradient_checkpointing=false")
    resources = SharedResources()
    slot = resources.bank(config).slots.create(config.lora, config.seed)
    optimizer = SlotOptimizer(config, slot, total=STEPS)
    optimizer.update(slot.gradient, GradientNorm.of(slot.gradient), 1e-3)
    states: list[dict[str, Any]] = list(optimizer._optimizer.state.values())
    size = sum(
        value.nbytes
        for state in states
        for value in state.values()
        if hasattr(value, "nbytes") and value.ndim
    )
    planned = plan_memory(config, resources).fullest.optimizer
    assert planned == pytest.approx(size, rel=0.02, abs=2048)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("optimizer.name=sgd", "+trainer.extra.optim_args=momentum"),
            "trainer.extra.optim_args=momentum: can't be read (",
        ),
        (
            ("optimizer.name=sgd", "+trainer.extra.optim_args='momentum=-1'"),
            "optimizer.name=sgd: Invalid momentum value",
        ),
        (
            ("optimizer.lora_plus_ratio=0.5",),
            "optimizer.lora_plus_ratio=0.5: must be at least 1, or null",
        ),
    ],
    ids=["unreadable", "impossible", "ratio"],
)
def test_refuses_in_one_line(
    tiny: Tiny, tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        run(tiny(*SHORT, *overrides), tmp_path / "run")
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


def test_a_checkpoint_counts_all_that_it_pins(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many small states are no less pinned memory than a few large ones."""
    from safetensors.torch import load_file

    from finetune.engine.packed import optimizer_state
    from finetune.engine.packed.gradient_norms import GradientNorm
    from finetune.engine.packed.optimizer import STATE, SlotOptimizer
    from finetune.model.device import HostCopy
    from finetune.run.resources import SharedResources

    config = tiny(*SHORT, *SETTINGS["adafactor"])
    slot = SharedResources().bank(config).slots.create(config.lora, 0)
    optimizer = SlotOptimizer(config, slot, STEPS)
    slot.gradient.fill_(1e-3)
    optimizer.update(slot.gradient, GradientNorm.of(slot.gradient), 1e-3)
    totals = []

    def copy(tensor: Any, total: int) -> HostCopy:
        totals.append(total)
        return HostCopy(tensor, total)

    monkeypatch.setattr(optimizer_state, "HostCopy", copy)
    optimizer.save(tmp_path, None)
    written = load_file(tmp_path / STATE).values()
    assert len(totals) == len(written) > 10
    assert set(totals) == {sum(tensor.nbytes for tensor in written)}
