"""Each GPU computes all blocks for slots of its own, with weights that it borrows of the others.

The GPUs are pretended (`support.pretend_gpus`): an operation on tensors of two of them is refused.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pretend_gpus import GPUS, pretend_gpus
from support.spread_bases import configs_of, llama, load_on_pretend_gpus, train

from finetune.config.schema import RunConfig

Tiny = Callable[..., RunConfig]


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    # Passes of fewer slots: products of other sizes may round otherwise.
    assert one["figures"] == pytest.approx(other["figures"], rel=1e-4)
    for mine, theirs in zip(one["gradients"], other["gradients"], strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-5)
    assert one["answers"] == other["answers"]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize(
    ("count", "quantization", "saves"),
    [(3, "none", True), (2, "none", False), (2, "nf4", True), (2, "nf4_double", True)],
)
def test_borrowed_is_the_pipeline_is_one_device(
    tiny: Tiny,
    tiny_base: Path,
    tmp_path: Path,
    count: int,
    quantization: str,
    saves: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("finetune.model.quantization.DEQUANTIZED_SHARE", 0)
    folder = llama(tiny_base, tmp_path / "base", tied=False, layers=4)
    more = "lora.dropout=0.2", f"quantization={quantization}"
    configs = configs_of(tiny, folder, count, *more)
    alone = train(configs, saves)
    load_on_pretend_gpus(monkeypatch)
    with pretend_gpus(monkeypatch):
        pipeline = train(configs, saves)
        borrowed = train(configs, saves, borrows_blocks=True)
    assert pipeline["slot_devices"] == [GPUS[0]] * count
    assert borrowed["slot_devices"] == [GPUS[number % 2] for number in range(count)]
    assert_equal(pipeline, alone)
    assert_equal(borrowed, alone)
