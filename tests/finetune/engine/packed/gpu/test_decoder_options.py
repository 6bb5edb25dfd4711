"""The decoder written by hand with options of single slots equals autograd."""

from typing import Any

import torch
from support.banks import load_bank
from support.runs import Tiny

from finetune.engine.packed.requests import ForwardBackward


def test_ranks_of_layers_and_noise_are_those_of_autograd(tiny: Tiny) -> None:
    overrides = (
        # More than 32: the gate's kernels leave the adapters to their own.
        ("+lora.extra.rank_pattern={q_proj:2,gate_proj:40}", "lora.r=8"),
        (
            "lora.target_modules=[q_proj,up_proj]",
            "+lora.extra.layers_to_transform=[1]",
            "+lora.extra.alpha_pattern={q_proj:64}",
        ),
        ("+lora.extra.exclude_modules=[down_proj]",),
    )
    configs = [tiny(*own, "quantization=none") for own in overrides]
    noises = (None, 40.0, 5.0)
    ids = torch.randint(3, 500, (6, 30), generator=torch.Generator().manual_seed(2))
    rows = [{"input_ids": row, "labels": row} for row in ids.tolist()]
    found: list[Any] = []
    for saves in (None, False):
        bank = load_bank(configs[0], saves)
        slots = [bank.slots.create(c.lora, seed) for seed, c in enumerate(configs)]
        torch.manual_seed(1)
        for slot in slots:
            # A fresh B is zero.
            slot.vector.add_(torch.randn_like(slot.vector), alpha=0.05)
        requests = [
            ForwardBackward(slot, rows[2 * n : 2 * n + 2], 0.1, 1, noise_alpha=noise)
            for n, (slot, noise) in enumerate(zip(slots, noises, strict=True))
        ]
        results = bank.forward_backward(requests)
        losses = [result.loss for result in results]
        found.append((losses, [slot.gradient.clone() for slot in slots]))
    (losses, gradients), (by_hand, by_hand_gradients) = found
    assert torch.allclose(torch.tensor(by_hand), torch.tensor(losses), rtol=1e-5)
    for one, other in zip(gradients, by_hand_gradients, strict=True):
        assert float((one - other).norm() / one.norm()) < 1e-4
