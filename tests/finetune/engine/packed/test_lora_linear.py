"""Dropout of the packed engine: drawn by seed, batch and layer, unbiased."""

import pytest
from support.runs import NONE, Tiny

from finetune.run.resources import SharedResources


def test_dropout_is_drawn_by_the_runs_seed_and_its_batch(tiny: Tiny) -> None:
    """Neither by its place in the pack nor by anything that was drawn before."""
    import torch

    from finetune.engine.packed.requests import ForwardBackward

    config = tiny("lora.dropout=0.5", "lora.init_lora_weights=false", NONE)
    resources = SharedResources()
    bank = resources.bank(config)
    rows = list(
        resources.tokens("train", resources.rows(config.dataset).train, config)
    )[:2]
    slots = [bank.slots.create(config.lora, seed) for seed in range(3)]
    for slot in slots[1:]:
        slot.vector.copy_(slots[0].vector)
        slot.refresh_weights()

    def loss(seed: int, draw: int) -> float:
        torch.rand(1)
        return bank.forward_backward([ForwardBackward(slots[seed], rows, 1.0, draw)])[
            0
        ].loss

    every = [loss(seed, draw) for seed in range(3) for draw in (1, 2, 3)]
    assert len(set(every)) == 9
    assert [loss(seed, draw) for seed in range(3) for draw in (1, 2, 3)] == every
    packed = bank.forward_backward(
        [ForwardBackward(slot, rows, 1.0, 2) for slot in reversed(slots)]
    )
    assert [learnt.loss for learnt in packed] == pytest.approx(
        [loss(seed, 2) for seed in (2, 1, 0)], rel=1e-5
    )


def test_dropout_leaves_what_an_adapter_adds_as_it_is_on_average() -> None:
    import torch

    from finetune.engine.packed.lora_linear import Adapter, SlotTokens, lora_linear

    torch.manual_seed(0)
    layer = torch.nn.Linear(32, 4, bias=False).requires_grad_(False)
    a, b = torch.rand(2, 32), torch.rand(4, 2)
    adapter = Adapter(0, 0.5, a, b, torch.zeros_like(a), torch.zeros_like(b))
    x = torch.rand(1, 1, 32).expand(1, 4000, 32)
    found = {}
    for dropout in (0.0, 0.25, 0.5):
        stretch = SlotTokens(3, dropout, adapter, 0, 4000, 1)
        added = lora_linear(
            x, torch.zeros((), requires_grad=True), None, layer, [stretch]
        ) - layer(x)
        found[dropout] = added[0].detach()
    assert torch.allclose(found[0.0], 0.5 * x[0] @ a.t() @ b.t(), rtol=1e-4)
    for dropout in (0.25, 0.5):
        assert torch.allclose(found[dropout].mean(0), found[0.0].mean(0), rtol=0.02)
        assert float(found[dropout].std(0).min()) > 0.05


def test_each_layer_draws_dropout_of_its_own(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from finetune.engine.packed.requests import ForwardBackward

    seeds: list[int] = []

    class Telling(torch.Generator):
        def manual_seed(self, seed: int) -> torch.Generator:
            seeds.append(seed)
            return super().manual_seed(seed)

    config = tiny("lora.dropout=0.5", NONE)
    resources = SharedResources()
    slots = [
        resources.bank(config).slots.create(config.lora, seed)
        for seed in (0, 2**32 - 1)
    ]
    rows = list(
        resources.tokens("train", resources.rows(config.dataset).train, config)
    )[:2]
    monkeypatch.setattr(torch, "Generator", Telling)
    for draw in (1, 2):
        slots[0].bank.forward_backward(
            [ForwardBackward(slot, rows, 1.0, draw) for slot in slots]
        )
    assert len(set(seeds)) == 2 * 2 * len(slots[0].adapters)
