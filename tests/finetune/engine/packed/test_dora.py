"""DoRA in a slot: as PEFT computes it and TRL trains it, and beside slots without it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import (
    NF4,
    NONE,
    Tiny,
    final,
    interrupt_and_resume,
    losses,
    saved_adapter,
    train_in_slots,
)

from finetune.run.context import RunContext
from finetune.run.resources import SharedResources
from finetune.run.run import run

DORA = (
    "lora.use_dora=true",
    "trainer.max_steps=20",
    "trainer.eval_steps=0",
    "trainer.save_steps=0",
    "sample_prompts=[]",
)


@pytest.mark.parametrize(
    "overrides",
    [
        (NF4,),
        pytest.param(
            (NONE, "lora.use_rslora=true", "trainer.gradient_accumulation_steps=2"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("quantization=fp4", "optimizer=lion", "lora/target=q_v"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_trains_as_with_trl(
    tiny: Tiny, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    for engine in ("trl", "packed"):
        config = tiny(*DORA, *overrides, f"trainer.engine={engine}")
        run(config, tmp_path / engine, RunContext(interactive=False))
    assert final(tmp_path / "packed")["engine"] == "packed"
    assert len(losses(tmp_path / "packed")) == 20
    assert losses(tmp_path / "packed") == pytest.approx(
        losses(tmp_path / "trl"), rel=1e-5
    )
    packed, trl = saved_adapter(tmp_path / "packed"), saved_adapter(tmp_path / "trl")
    assert float((packed - trl).norm() / trl.norm()) < 1e-4


def test_slots_with_and_without_train_as_alone(tiny: Tiny, tmp_path: Path) -> None:
    """Plain slots before, between and after."""
    configs = [
        tiny(*DORA, NONE, "lora.dropout=0.1", f"seed={seed}", *overrides)
        for seed, overrides in enumerate(
            [
                ("lora.use_dora=false",),
                ("lora.r=4",),
                ("lora.use_dora=false", "lora/target=q_v"),
                ("lora.target_modules=[up_proj,q_proj]",),
                ("lora.use_dora=false",),
            ]
        )
    ]
    together = train_in_slots(configs, tmp_path, len(configs))
    for number, config in enumerate(configs):
        alone = tmp_path / f"alone{number}"
        run(config, alone, RunContext(interactive=False))
        assert losses(together[number]) == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("has_bias", [False, True])
def test_is_pefts_layer(dropout: float, has_bias: bool) -> None:
    """Output and gradients of PEFT's own layer, with the same elements dropped."""
    from peft import LoraConfig, get_peft_model

    from finetune.engine.packed.dora import dora_linear
    from finetune.engine.packed.lora_linear import Adapter, SlotTokens

    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(24, 10, bias=has_bias))
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        use_dora=True,
        init_lora_weights=False,
        target_modules=["0"],
    )
    model = get_peft_model(base, config)
    layer: Any = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    magnitude.data *= 1.3
    adapter = Adapter(
        0,
        5 / 3,
        a.detach(),
        b.detach(),
        torch.zeros_like(a),
        torch.zeros_like(b),
        magnitude.detach(),
        torch.zeros_like(magnitude),
    )
    slot = SlotTokens(7, dropout, adapter, 0, 6, 1)
    x = torch.randn(6, 24)
    mask = slot.dropout_mask(x)

    class SameDropout(torch.nn.Module):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            assert mask is not None
            return values.masked_fill(mask, 0.0) / (1 - dropout)

    if dropout:
        layer.lora_dropout["default"] = SameDropout()
    theirs_x = x.clone().requires_grad_()
    theirs = model(theirs_x)
    ours_x = x.clone().requires_grad_()
    ours = dora_linear(
        ours_x[None], torch.zeros((), requires_grad=True), layer.base_layer, [slot]
    )[0]
    assert torch.allclose(ours, theirs, atol=1e-5)
    gradient = torch.randn_like(theirs)
    theirs.backward(gradient)
    ours.backward(gradient)
    assert theirs_x.grad is not None
    assert ours_x.grad is not None
    assert torch.allclose(ours_x.grad, theirs_x.grad, atol=1e-5)
    assert torch.allclose(adapter.gradient_a, a.grad, atol=1e-5)
    assert torch.allclose(adapter.gradient_b, b.grad, atol=1e-5)
    assert adapter.gradient_magnitude is not None
    assert torch.allclose(adapter.gradient_magnitude, magnitude.grad, atol=1e-5)


def test_goes_on_bit_for_bit_and_with_checkpointing(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(*DORA, NF4, "trainer.max_steps=6", "lora.dropout=0.1")
    run(config, tmp_path / "whole", RunContext(interactive=False))
    interrupt_and_resume(config, tmp_path / "resumed", step=3)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
    recomputed = tiny(
        *DORA,
        NF4,
        "trainer.max_steps=6",
        "lora.dropout=0.1",
        "trainer.gradient_checkpointing=true",
    )
    run(recomputed, tmp_path / "recomputed", RunContext(interactive=False))
    assert losses(tmp_path / "recomputed") == pytest.approx(
        losses(tmp_path / "whole"), rel=1e-6
    )


def test_goes_on_from_a_trained_adapter(tiny: Tiny, tmp_path: Path) -> None:
    run(tiny(*DORA, NONE), tmp_path / "first", RunContext(interactive=False))
    config = tiny(*DORA, NONE, f"lora.adapter={tmp_path / 'first'}")
    run(config, tmp_path / "second", RunContext(interactive=False))
    assert losses(tmp_path / "second")[0] < losses(tmp_path / "first")[5]


def test_generates_as_pefts_own_model(tiny: Tiny, tmp_path: Path) -> None:
    """The logits of the next token, beside a slot without DoRA."""
    from finetune.model.adapter import attach_adapter

    config = tiny(*DORA, NONE, "optimizer.learning_rate=1e-2")
    run(config, tmp_path, RunContext(interactive=False))
    resources = SharedResources()
    bank = resources.bank(config)
    from finetune.model.adapter import load_adapter

    plain = bank.slots.create(tiny("lora.init_lora_weights=false").lora, 1)
    slot = bank.slots.create(config.lora, 0)
    load_adapter(slot.model, tmp_path / "adapter")
    slot.vector.copy_(torch.cat([p.data.flatten() for p in slot.parameters]))
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad(), bank.backends.autograd.adapted_rows([plain, slot]) as adapted:
        ours = adapted(tokens.expand(2, -1)).logits[1]
    bank.base.cpu()
    fresh = SharedResources().bank(config).base
    model = attach_adapter(fresh, tmp_path / "adapter").eval()
    with torch.no_grad():
        theirs = model(tokens).logits[0]
    assert torch.allclose(ours, theirs, atol=1e-4)
