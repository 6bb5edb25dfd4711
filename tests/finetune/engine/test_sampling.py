"""Sampled tokens: their shares, and how little rounding changes them."""

import pytest
import torch

from finetune.engine.encoded_prompts import Sampling
from finetune.engine.sampling import RowSampler


def draw(scores: torch.Tensor, seed: int, top_p: float) -> int:
    sampler = RowSampler([(Sampling(1.0, top_p, seed), 0)], 1, torch.device("cpu"))
    return int(sampler(torch.empty(0), scores).argmax())


def test_tokens_are_drawn_by_their_shares_of_the_likeliest() -> None:
    # In no order; 0.95 of all together reach the share of 0.9, the last one is never drawn.
    scores = torch.tensor([[0.15, 0.05, 0.5, 0.3]]).log()
    drawn = torch.tensor([draw(scores, seed, 0.9) for seed in range(2000)])
    counts = torch.bincount(drawn, minlength=4) / 2000
    expected = torch.tensor([0.15, 0.0, 0.5, 0.3]) / 0.95
    assert counts.tolist() == pytest.approx(expected.tolist(), abs=0.03)


def test_rounding_exchanges_no_tokens_that_are_about_equally_likely() -> None:
    generator = torch.Generator().manual_seed(0)
    for seed in range(300):
        scores = 0.01 * torch.randn(1, 300, generator=generator)
        rounding = 1e-6 * torch.randn(1, 300, generator=generator)
        assert draw(scores, seed, 1.0) == draw(scores + rounding, seed, 1.0)
