"""Slots on small bases of the GPU's decoder, and passes that train them."""

from pathlib import Path
from typing import Any

from support.banks import load_bank
from support.decoder_bases import SLOTS

Figures = tuple[list[float], list[Any]]


def make_slots(tiny: Any, folder: Path, dropout: float, saves: Any) -> list[Any]:
    """Three slots of different ranks and layers on one bank, none at its start."""
    import torch

    here = f"model.name_or_path={folder}"
    drops = f"lora.dropout={dropout}"
    configs = [
        tiny(here, drops, f"seed={seed}", *settings)
        for seed, settings in enumerate(SLOTS)
    ]
    bank = load_bank(configs[0], saves)
    slots = [bank.slots.create(config.lora, config.seed) for config in configs]
    torch.manual_seed(1)
    for slot in slots:
        slot.vector.add_(torch.randn_like(slot.vector), alpha=0.05)
    return slots


def make_rows(lengths: list[int], seed: int) -> list[dict[str, list[int]]]:
    """Rows of random tokens, all with the same beginning."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 500, (9,), generator=generator).tolist()
    rows = []
    for length in lengths:
        ids = start + torch.randint(0, 500, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * 9 + ids[9:]})
    return rows


def train(slots: list[Any], lengths: list[list[int]], seed: int = 2) -> Figures:
    """Losses and gradients of one pass, in which each slot has rows of so many tokens."""
    from finetune.engine.packed.requests import ForwardBackward

    requests = [
        ForwardBackward(slot, make_rows(some, seed + number), 0.1, seed)
        for number, (slot, some) in enumerate(zip(slots, lengths, strict=True))
    ]
    results = slots[0].bank.forward_backward(requests)
    losses = [result.loss for result in results]
    return losses, [slot.gradient.clone() for slot in slots]


def evaluate(slots: list[Any], lengths: list[list[int]], seed: int = 2) -> list[Any]:
    """The evaluations of one pass, in which each slot has rows of so many tokens."""
    from finetune.engine.packed.requests import Evaluate

    requests = [
        Evaluate(slot, make_rows(some, seed + number))
        for number, (slot, some) in enumerate(zip(slots, lengths, strict=True))
    ]
    evaluations: list[Any] = slots[0].bank.evaluate(requests)
    return evaluations
