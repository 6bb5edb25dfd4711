"""The emulation of 8-bit floats rounds what it says, and no more (benchmarks/float8_quality.py)."""

from types import ModuleType

import pytest
from support.packs import BATCHES, Pack, share_of_difference
from support.runs import Tiny
from support.scripts import load_script

from finetune.config.paths import CONF


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(CONF.parent / "benchmarks" / "float8_quality.py")


def test_each_tile_is_rounded_with_a_scale_of_its_own(script: ModuleType) -> None:
    import torch

    values = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    values[:2] *= 1e-6
    values[:, :128] *= 1e6

    rounded = script.round_to(script.E4M3, values, (2, 128))

    # Three bits behind the point; what is far below the largest value of its tile loses more.
    assert share_of_difference(rounded, values) < 2**-4
    for rows in (slice(0, 2), slice(2, 4), slice(4, 5)):
        for columns in (slice(0, 128), slice(128, 256), slice(256, 300)):
            tile = values[rows, columns]
            assert 1e-3 < share_of_difference(rounded[rows, columns], tile) < 2**-4
            alone = script.round_to(script.E4M3, tile, (2, 128))
            assert torch.equal(rounded[rows, columns], alone)
    assert torch.equal(script.round_to(script.E4M3, rounded, (2, 128)), rounded)
    zeros = torch.zeros(3, 5)
    assert torch.equal(script.round_to(script.E5M2, zeros, (1, 128)), zeros)


def test_training_is_rounded_and_no_evaluation(script: ModuleType, tiny: Tiny) -> None:
    pack = Pack("Llama", tiny)
    losses, evaluated = pack.train(BATCHES), pack.row_losses(BATCHES)
    gradients = [slot.gradient.clone() for slot in pack.slots]
    differences = {}
    for name in ("blocks_inner", "blocks", "both"):
        with script.emulated(script.LINES[name]):
            rounded = pack.train(BATCHES)
            assert pack.row_losses(BATCHES) == evaluated
        differences[name] = [
            share_of_difference(slot.gradient, gradient)
            for slot, gradient in zip(pack.slots, gradients, strict=True)
        ]
        if name == "blocks_inner":
            # The base has no blocks but the first and the last one.
            assert rounded == pytest.approx(losses, rel=1e-5)
        else:
            assert rounded != pytest.approx(losses, rel=1e-4)
            assert rounded == pytest.approx(losses, rel=0.1)
    assert max(differences["blocks_inner"]) < 1e-4
    assert 0.01 < min(differences["blocks"]) < min(differences["both"])
    assert pack.train(BATCHES) == losses
