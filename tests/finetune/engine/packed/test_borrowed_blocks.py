"""Each GPU computes all blocks for slots of its own, with weights that it borrows from the others.

The GPUs are pretended (`support.pretend_gpus`): an operation on tensors of two of them is refused.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.banks import load_bank
from support.decoder_bases import random_base
from support.pretend_gpus import GPUS, pretend_gpus
from support.spread_bases import (
    assert_resumed_is_alone,
    configs_of,
    llama,
    load_on_pretend_gpus,
    train,
)

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


@pytest.mark.matrix
@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("architecture", ["gemma3_text", "qwen3_5_text", "ministral3"])
def test_of_other_architectures(
    tiny: Tiny,
    tiny_base: Path,
    tmp_path: Path,
    architecture: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = random_base(architecture, tiny_base, tmp_path / "base")
    configs = configs_of(tiny, folder, 2)
    alone = train(configs, True)
    load_on_pretend_gpus(monkeypatch)
    with pretend_gpus(monkeypatch):
        assert_equal(train(configs, True, borrows_blocks=True), alone)


@pytest.fixture
def small_base(tiny_base: Path, tmp_path: Path) -> Path:
    return llama(tiny_base, tmp_path / "base", tied=False, layers=2)


def test_half_of_the_requests_is_half_of_those_of_each_gpu() -> None:
    """As they are executed where memory is too short for all."""
    from finetune.engine.packed.requests_by_device import alternating

    first, second = GPUS
    for devices in ([second, second, first, first], [first, first, second], [first]):
        requests: list[Any] = [
            SimpleNamespace(slot=SimpleNamespace(device=device)) for device in devices
        ]
        ordered = alternating(requests)
        assert sorted(map(id, ordered)) == sorted(map(id, requests))
        half = [request.slot.device for request in ordered[: len(ordered) // 2]]
        assert abs(half.count(first) - half.count(second)) <= 1
        of_first = [request for request in ordered if request.slot.device == first]
        assert of_first == [each for each in requests if each.slot.device == first]


def test_slots_are_spread_evenly_while_trials_end_and_begin(
    tiny: Tiny, small_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.engine.packed.backends import Backends

    (config,) = configs_of(tiny, small_base, 1)
    load_on_pretend_gpus(monkeypatch)
    monkeypatch.setattr(Backends, "check", lambda *_: None)
    first, second = GPUS
    with pretend_gpus(monkeypatch):
        bank = load_bank(config, True, borrows_blocks=True)
        slots = [bank.slots.create(config.lora, seed) for seed in range(4)]
        assert [slot.device for slot in slots] == [first, second] * 2
        for slot in slots:
            everything = {slot.vector.device, slot.gradient.device}
            everything |= {adapter.a.device for adapter in slot.adapters.values()}
            assert everything == {slot.device}
        # Both on one GPU end: the next two begin there.
        for slot in slots[1::2]:
            bank.slots.remove(slot)
        begun = [bank.slots.create(config.lora, seed) for seed in range(3)]
        assert [slot.device for slot in begun] == [second, second, first]


def test_a_run_that_ends_leaves_its_place(
    tiny: Tiny, small_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.engine.packed.backends import Backends
    from finetune.run.resources import SharedResources

    (config,) = configs_of(tiny, small_base, 1)
    load_on_pretend_gpus(monkeypatch)
    decide_for_the_decoder(monkeypatch)
    monkeypatch.setattr(Backends, "check", lambda *_: None)
    resources = SharedResources()
    with pretend_gpus(monkeypatch), resources.borrowed_blocks(True):
        devices = []
        with resources.slot(config) as stays:
            devices.append(stays().device)
            for _ in range(2):
                with resources.slot(config) as ends:
                    devices.append(ends().device)
        with resources.slot(config) as last:
            devices.append(last().device)
    assert devices == [GPUS[0], GPUS[1], GPUS[1], GPUS[0]]


def decide_for_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let banks have the kernels, as on a GPU."""
    from finetune.engine.packed import backend

    monkeypatch.setattr(backend, "supports_gpu_decoder", lambda *_: True)


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("wrong", GPUS)
def test_where_autograd_replaces_the_decoder_slots_are_as_in_the_pipeline(
    tiny: Tiny,
    small_base: Path,
    wrong: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One GPU's copies are wrong, also those that the first slot does not use."""
    from finetune.engine.packed.gpu.borrowed_blocks import BorrowedBlocks
    from finetune.engine.packed.requests import Evaluate, ForwardBackward
    from finetune.engine.probes import Shortcut, _answers

    configs = configs_of(tiny, small_base, 2)
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}]

    def figures(bank: Any) -> Any:
        slots = [bank.slots.create(config.lora, config.seed) for config in configs]
        assert [slot.device for slot in slots] == [bank.device] * 2
        assert not any(slot.is_on_one_device for slot in slots)
        requests = [ForwardBackward(slot, rows, 0.1, 1) for slot in slots]
        results = bank.forward_backward(requests)
        evaluations = bank.evaluate([Evaluate(slot, rows) for slot in slots])
        return [
            *(result.loss for result in results),
            *(result.norm for result in results),
            *(evaluation.row_losses[0] for evaluation in evaluations),
        ]

    expected = figures(load_bank(configs[0], None))
    original = BorrowedBlocks._fetch

    def fetch(self: Any, number: int) -> None:
        original(self, number)
        if self._device == wrong:
            for views in self._views[number]:
                views[0].zero_()

    monkeypatch.setattr(BorrowedBlocks, "_fetch", fetch)
    load_on_pretend_gpus(monkeypatch)
    with pretend_gpus(monkeypatch):
        bank = load_bank(configs[0], True, borrows_blocks=True)
        assert bank.backends.current.borrows_blocks
        assert figures(bank) == pytest.approx(expected, rel=1e-4)
        assert not bank.backends.current.borrows_blocks
    reasons = {
        variant[-5:]: reason
        for (shortcut, _, variant), reason in _answers[bank.base].items()
        if shortcut is Shortcut.GPU_DECODER
    }
    assert reasons.pop(str(wrong)).startswith("they differ by")
    assert set(reasons.values()) <= {None}


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_cache")
def test_a_run_on_the_second_gpu_goes_on_from_its_checkpoint(
    tiny: Tiny, small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.engine.packed.bank_slots import BankSlots
    from finetune.run.context import RunContext
    from finetune.run.resources import SharedResources
    from finetune.run.run import run

    config = tiny(
        f"model.name_or_path={small_base}",
        "quantization=none",
        "trainer.save_steps=2",
        "trainer.max_steps=4",
        "trainer.per_device_train_batch_size=1",
    )

    def complete(folder: Path) -> None:
        resources = SharedResources()
        with resources.borrowed_blocks(True):
            run(config, folder, RunContext(interactive=False, resources=resources))

    def spread_base() -> None:
        load_on_pretend_gpus(monkeypatch)
        decide_for_the_decoder(monkeypatch)
        monkeypatch.setattr(BankSlots, "_emptiest_gpu", lambda _: GPUS[1])

    assert_resumed_is_alone(complete, spread_base, tmp_path, monkeypatch)


def test_a_replica_copies_nothing_but_its_small_weights(
    tiny: Tiny, small_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What hooks on the base refer to would be copied with it, up to the base itself."""
    from finetune.engine.packed.gpu.borrowed_blocks import Replica
    from finetune.run.resources import SharedResources

    (config,) = configs_of(tiny, small_base, 1)
    load_on_pretend_gpus(monkeypatch)
    decide_for_the_decoder(monkeypatch)
    original = Replica.of
    replicas = []

    def refuse(*_: Any) -> None:
        raise AssertionError("a tensor is copied")

    def of(module: Any, device: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "__deepcopy__", refuse)
            patch.setattr(torch.nn.Parameter, "__deepcopy__", refuse)
            replicas.append((module, original(module, device)))
        return replicas[-1][1]

    monkeypatch.setattr(Replica, "of", of)
    resources = SharedResources()
    with pretend_gpus(monkeypatch), resources.borrowed_blocks(True):
        # Its base has hooks by then.
        assert resources.bank(config).backends.current.borrows_blocks
    assert len(replicas) == 2
    for module, replica in replicas:
        present = {
            name: weight.numel()
            for name, weight in replica.module.named_parameters()
            if weight.numel()
        }
        names = [name for name, _ in module.named_parameters()]
        assert [*present] == [name for name in names if "norm" in name]
