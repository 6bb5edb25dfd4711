"""A base whose blocks are on two devices trains as on one.

On a machine without GPUs a second device is a name only: `cpu:1`, whose tensors are on the CPU. So
sections of the slots, tables and passes are divided as on two GPUs.
"""

import os
import re
from typing import Any

import pytest
import torch
import transformers
from support.banks import load_bank

from finetune.errors import ConfigError
from finetune.model import device
from finetune.model.device import spread_gpus
from finetune.model.layer_devices import require_spreadable
from finetune.run.memory_plan import plan_memory
from finetune.run.plan import spread_plan
from finetune.run.resources import SharedResources

BLOCKS = 4
SECOND = torch.device("cpu:1")


@pytest.fixture
def spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the second half of each base's blocks on another device."""

    def block_devices(decoder: Any) -> list[torch.device]:
        half = len(decoder.layers) // 2
        return [torch.device("cpu")] * half + [SECOND] * (len(decoder.layers) - half)

    def layer_device(base: Any, name: str) -> torch.device:
        number = int(name.partition(".layers.")[2].partition(".")[0])
        return block_devices(base.get_decoder())[number]

    packed = "finetune.engine.packed"
    for module in (
        "slot.layer_device",
        "bank.count_stages",
        "gpu.decoder.count_stages",
    ):
        fake = layer_device if "layer" in module else lambda base: 2
        monkeypatch.setattr(f"{packed}.{module}", fake)
    for module in ("gpu.blocks", "gpu.context_maker"):
        monkeypatch.setattr(f"{packed}.{module}.block_devices", block_devices)


def train(configs: list[Any], saves: bool | None) -> tuple[list[float], list[Any]]:
    """Train slots for three steps; return all losses and norms, and the trained weights.

    Args:
        configs: Of each slot.
        saves: See `load_bank`.
    """
    from finetune.engine.packed.requests import Evaluate, ForwardBackward

    bank = load_bank(configs[0], saves)
    slots = [bank.create_slot(config.lora, config.seed) for config in configs]
    generator = torch.Generator().manual_seed(1)
    figures = []
    for slot in slots:
        # Other weights in each slot, none of them zero.
        slot.vector.add_(0.02 * torch.randn(slot.vector.shape, generator=generator))
    for step in range(1, 4):
        requests = []
        for number, slot in enumerate(slots):
            ids = torch.randint(0, 500, (2, 12 + number), generator=generator).tolist()
            rows = [{"input_ids": row, "labels": [-100] * 5 + row[5:]} for row in ids]
            requests.append(ForwardBackward(slot, rows, 0.1, step))
        results = bank.forward_backward(requests)
        evaluations = bank.evaluate(
            [
                Evaluate(slot, request.rows)
                for slot, request in zip(slots, requests, strict=True)
            ]
        )
        for result, evaluation in zip(results, evaluations, strict=True):
            figures += [result.loss, result.norm, *evaluation.row_losses]
        for slot in slots:
            slot.vector.sub_(slot.gradient)
    return figures, [slot.vector for slot in slots]


def compare(configs: list[Any], saves: bool | None, request: Any) -> None:
    alone, expected = train(configs, saves)
    request.getfixturevalue("spread")
    figures, vectors = train(configs, saves)
    # Passes of fewer slots: products of other sizes may round otherwise.
    assert figures == pytest.approx(alone, rel=1e-5)
    for vector, other in zip(vectors, expected, strict=True):
        assert torch.allclose(vector, other, rtol=1e-4, atol=1e-6)


def configs_of(tiny: Any, folder: Any, *more: str) -> list[Any]:
    targets = ("q_proj", "down_proj"), ("v_proj",), ("q_proj", "k_proj", "up_proj")
    return [
        tiny(
            f"model.name_or_path={folder}",
            "quantization=none",
            f"lora.target_modules=[{','.join(names)}]",
            f"lora.r={2 + number}",
            f"seed={number}",
            *more,
        )
        for number, names in enumerate([*targets, *targets])
    ]


@pytest.mark.parametrize("dropout", [0, 0.3])
def test_with_autograd(tiny: Any, tiny_base: Any, dropout: float, request: Any) -> None:
    compare(configs_of(tiny, tiny_base, f"lora.dropout={dropout}"), None, request)


@pytest.mark.slow
@pytest.mark.parametrize("saves", [True, False])
def test_with_the_decoder_by_hand(
    tiny: Any, tiny_base: Any, saves: bool, request: Any
) -> None:
    configs = configs_of(tiny, tiny_base, "lora.dropout=0")[:3]
    compare(configs, saves, request)


@pytest.mark.parametrize(
    ("visible", "setting", "gpus"),
    [(0, "auto", 1), (4, "auto", 1), (4, 2, 2), (2, 2, 2)],
)
def test_so_many_gpus(
    visible: int, setting: int | str, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    see_gpus(monkeypatch, visible)
    assert spread_gpus(setting) == gpus


@pytest.mark.parametrize(
    ("visible", "setting", "line"),
    [
        (0, 2, "trainer.gpus=2: 0 GPUs are visible here"),
        (1, 2, "trainer.gpus=2: 1 GPU is visible here"),
        (4, 8, "trainer.gpus=8: 4 GPUs are visible here"),
    ],
)
def test_gpus_that_are_not_there_are_refused(
    visible: int, setting: int, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    see_gpus(monkeypatch, visible)
    with pytest.raises(ConfigError, match=re.escape(line)):
        spread_gpus(setting)


def test_a_worker_spreads_over_the_gpus_it_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    see_gpus(monkeypatch, 4)
    monkeypatch.setattr(device, "_has_selected", False)
    monkeypatch.setattr(device, "_selected_size", 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    device.select_gpus(1, 2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert spread_gpus("auto") == 2
    assert spread_gpus(1) == 1


def test_blocks_that_share_tensors_stay_together() -> None:
    shapes = transformers.Gemma4TextConfig(num_kv_shared_layers=2)
    with pytest.raises(ConfigError, match=r"trainer.gpus=2: .* gemma4_text share"):
        require_spreadable(shapes, 2)
    require_spreadable(transformers.LlamaConfig(), 2)


def test_the_plan_of_the_fullest_gpu(tiny: Any, tiny_base: Any) -> None:
    plan = plan_memory(tiny(f"model.name_or_path={tiny_base}"), SharedResources())
    spread_over_two = spread_plan(plan, 2, 80)
    assert spread_over_two.base == plan.base * 41 // 80
    assert spread_plan(plan, 2, 2).base == plan.base
    assert spread_over_two.peak() == plan.peak() - plan.base + spread_over_two.base


def see_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let a process count so many GPUs."""
    monkeypatch.setattr(device, "on_gpu", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
