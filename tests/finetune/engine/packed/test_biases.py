"""Trained biases of adapted layers in a slot (`lora.bias=lora_only`)."""

import shutil
from pathlib import Path

import pytest
from support.runs import (
    Tiny,
    final,
    interrupt_and_resume,
    losses,
    saved_adapter,
    train_in_slots,
)
from support.tiny_base import give_biases

from finetune.run.context import RunContext
from finetune.run.run import run

BIASES = (
    "lora.bias=lora_only",
    "optimizer.weight_decay=0.1",
    "trainer.max_steps=20",
    "trainer.eval_steps=0",
    "trainer.save_steps=0",
    "sample_prompts=[]",
)


@pytest.fixture(scope="module")
def biased(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The override of a base whose attention has biases, which are not zero."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("biased") / "base"
    shutil.copytree(tiny_base, folder)
    give_biases(folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, weight in weights.items():
        if name.endswith("bias"):
            weight += 0.05
    save_file(weights, file, metadata={"format": "pt"})
    return f"model.name_or_path={folder}"


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        pytest.param(("lora.use_dora=true",), marks=pytest.mark.slow),
        pytest.param(("optimizer.lora_plus_ratio=4",), marks=pytest.mark.slow),
        pytest.param(
            ("quantization=none", "optimizer=adafactor"), marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_trains_as_with_trl(
    tiny: Tiny, biased: str, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    for engine in ("trl", "packed"):
        config = tiny(biased, *BIASES, *overrides, f"trainer.engine={engine}")
        run(config, tmp_path / engine, RunContext(interactive=False))
    assert final(tmp_path / "packed")["engine"] == "packed"
    assert losses(tmp_path / "packed") == pytest.approx(
        losses(tmp_path / "trl"), rel=1e-5
    )
    packed, trl = saved_adapter(tmp_path / "packed"), saved_adapter(tmp_path / "trl")
    # The biases are saved too.
    trained = final(tmp_path / "trl")["metrics"]["adapter/parameters"]
    assert len(packed) == len(trl) == trained
    assert float((packed - trl).norm() / trl.norm()) < 1e-4


def test_beside_others_and_resumed(tiny: Tiny, biased: str, tmp_path: Path) -> None:
    configs = [
        tiny(biased, *BIASES, "trainer.max_steps=8", "seed=1", *overrides)
        for overrides in ((), ("lora.bias=none",), ("lora.use_dora=true",))
    ]
    together = train_in_slots(configs, tmp_path, len(configs))
    for number, config in enumerate(configs):
        alone = tmp_path / f"alone{number}"
        run(config, alone, RunContext(interactive=False))
        assert losses(together[number]) == pytest.approx(losses(alone), rel=1e-5)
    interrupt_and_resume(configs[0], tmp_path / "resumed", step=3)
    assert saved_adapter(tmp_path / "resumed").equal(saved_adapter(tmp_path / "alone0"))


def test_generates_as_pefts_own_model(tiny: Tiny, biased: str, tmp_path: Path) -> None:
    """The logits of the next token, beside a slot without trained biases."""
    import torch

    from finetune.model.adapter import attach_adapter, load_adapter
    from finetune.run.resources import SharedResources

    fast = ("optimizer.learning_rate=1e-2", "quantization=none")
    config = tiny(biased, *BIASES, *fast)
    run(config, tmp_path, RunContext(interactive=False))
    bank = SharedResources().bank(config)
    plain = bank.slots.create(tiny("lora.init_lora_weights=false").lora, 1)
    slot = bank.slots.create(config.lora, 0)
    load_adapter(slot.model, tmp_path / "adapter")
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad(), bank.backends.autograd.adapted_rows([plain, slot]) as adapted:
        ours = adapted(tokens.expand(2, -1)).logits[1]
    fresh = SharedResources().bank(config).base
    model = attach_adapter(fresh, tmp_path / "adapter").eval()
    with torch.no_grad():
        theirs = model(tokens).logits[0]
    assert torch.allclose(ours, theirs, atol=1e-4)
