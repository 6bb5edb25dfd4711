"""The decoder written by hand equals each architecture with autograd."""

from collections.abc import Iterator
from typing import Any

import pytest
from support.banks import load_bank
from support.decoder_bases import ARCHITECTURES, SLOTS, random_base
from support.matrix import further

EVERY_TIME = ("phi3", "qwen3_5_text")
"""With Llama, these launch every kernel and have joined layers. The Triton interpreter takes a
minute for each base."""


def bases() -> Iterator[Any]:
    """One base in the fast tests, some in the slow ones, all others with the large tables."""
    yield "llama", True
    yield pytest.param("llama", False, marks=pytest.mark.slow)
    for architecture in list(ARCHITECTURES)[1:]:
        for saves in (True, False):
            always = saves and architecture in EVERY_TIME
            mark = pytest.mark.slow if always else pytest.mark.matrix
            yield pytest.param(architecture, saves, marks=[pytest.mark.slow, mark])


@pytest.mark.parametrize(("architecture", "saves"), list(bases()))
def test_the_decoder_by_hand_is_each_architecture_with_autograd(
    tiny: Any,
    tiny_base: Any,
    tmp_path: Any,
    architecture: str,
    saves: bool,
) -> None:
    import torch

    from finetune.engine.packed.requests import Evaluate, ForwardBackward

    folder = random_base(architecture, tiny_base, tmp_path / "base")
    here = f"model.name_or_path={folder}"
    saving = f"trainer.gradient_checkpointing={str(saves).lower()}"
    joined = ("lora.r=16", "lora.target_modules=[qkv_proj]", "lora.use_rslora=true")
    settings = SLOTS if architecture != "phi3" else (SLOTS[0], joined, SLOTS[2])
    configs = [
        tiny(here, saving, "lora.dropout=0", f"seed={seed}", *own)
        for seed, own in enumerate(settings)
    ]
    found = []
    for by_hand in (False, True):
        bank = load_bank(configs[0], saves if by_hand else None)
        slots = [bank.slots.create(config.lora, config.seed) for config in configs]
        torch.manual_seed(1)
        for slot in slots:
            slot.vector.add_(
                torch.randn_like(slot.vector), alpha=0.05
            )  # a fresh B is zero
        ids = torch.randint(
            0, 500, (5, 30), generator=torch.Generator().manual_seed(2)
        ).tolist()
        rows = [
            {
                "input_ids": ids[0][:9] + own[: 3 + place],
                "labels": [-100] * 9 + own[: 3 + place],
            }
            for place, own in enumerate(ids)
        ]
        parts = [rows[:2], rows[2:3], rows[3:]]
        learnt = bank.forward_backward(
            [
                ForwardBackward(slot, own, 0.1, 1)
                for slot, own in zip(slots, parts, strict=True)
            ]
        )
        measured = bank.evaluate(
            [Evaluate(slot, own) for slot, own in zip(slots, parts, strict=True)]
        )
        losses = [one.loss for one in learnt] + [
            loss for one in measured for loss in one.row_losses
        ]
        found.append((losses, [slot.gradient.clone() for slot in slots]))
    (losses, gradients), (others, expected) = found[1], found[0]
    assert losses == pytest.approx(others, rel=1e-5)
    for one, other in zip(gradients, expected, strict=True):
        assert float(other.norm()) > 0
        assert float((one - other).norm() / other.norm()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", *further("gemma4_text")])
def test_dropout_is_the_same_when_activations_are_computed_again(
    tiny: Any, tiny_base: Any, tmp_path: Any, architecture: str
) -> None:
    import torch

    from finetune.engine.packed.requests import ForwardBackward

    folder = random_base(architecture, tiny_base, tmp_path / "base")
    config = tiny(
        f"model.name_or_path={folder}",
        "lora.dropout=0.5",
        "lora.r=4",
        "lora/target=all_linear",
    )
    found = []
    for saves in (False, True):
        slot = load_bank(config, saves).slots.create(config.lora, 0)
        torch.manual_seed(1)
        slot.vector.add_(torch.randn_like(slot.vector), alpha=0.05)
        rows = [{"input_ids": list(range(20)), "labels": list(range(20))}]
        for number in (1,) if saves else (1, 2):
            learnt = slot.bank.forward_backward(
                [ForwardBackward(slot, rows, 0.1, number)]
            )[0]
            found.append((learnt.loss, slot.gradient.clone()))
    assert found[0][0] == found[2][0]
    assert found[0][0] != found[1][0]
    assert torch.equal(found[0][1], found[2][1])
    assert not torch.equal(found[0][1], found[1][1])
