"""The planned memory of a base that is spread over several GPUs."""

import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from finetune.config.paths import CONF


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(CONF.parent / "benchmarks")
        yield importlib.import_module("gpu")


@pytest.fixture
def pretended_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of a machine with as many GPUs as are asked for; it reads no weights."""
    base, stages = "finetune.run.planned_base", "finetune.run.stages"
    for planner in (base, "finetune.run.plan"):
        monkeypatch.setattr(f"{planner}.on_gpu", lambda: True)
    monkeypatch.setattr(f"{stages}.spread_gpus", int)
    memory = "finetune.run.memory_plan.available_memory"
    monkeypatch.setattr(memory, lambda gpus: 24 * 2**30)
    monkeypatch.setattr(f"{base}.supports_gpu_decoder", lambda *_: True)
    for module in (
        *(base, stages),
        *("finetune.run.memory_costs", "finetune.model.loading"),
    ):
        monkeypatch.setattr(f"{module}.compute_dtype", lambda _: torch.bfloat16)


def plan_of(benchmark: Any, gpus: int) -> Any:
    case = benchmark.Case(
        *("llama3_3_70b", "ours", "q_v", "short", True, "1", "nf4_double", 8, False),
        gpus,
    )
    case.warm = 4  # as measured: more steps may have a larger batch
    return case.plan_memory()


@pytest.mark.usefixtures("pretended_gpus")
@pytest.mark.parametrize("gpus", [2, 3, 4])
def test_gpus_together_hold_what_one_does(benchmark: Any, gpus: int) -> None:
    (one,) = plan_of(benchmark, 1).devices
    plan = plan_of(benchmark, gpus)
    devices = plan.devices
    assert len(devices) == plan.gpus == gpus
    assert sum(device.base for device in devices) == pytest.approx(one.base, abs=gpus)
    for kind in ("single", "packed"):
        stored = [getattr(device.activations, kind).stored for device in devices]
        assert sum(stored) == getattr(one.activations, kind).stored
        # The last blocks keep their activations.
        assert stored == sorted(stored)
    assert [device.optimizer for device in devices] == [
        one.optimizer,
        *[0] * (gpus - 1),
    ]
    assert 0 < plan.further_slot < one.peak(1, 1, one.batch_tokens, one.batch_tokens)


@pytest.mark.usefixtures("pretended_gpus")
def test_is_what_two_gpus_have_taken(benchmark: Any) -> None:
    """`benchmarks/gpu.py --gpus 2 --shapes llama3_3_70b` on two H200s: the peak of the fullest.

    With one slot in each group the first GPU is the fullest, as it has the optimizers; with two,
    the last one, whose blocks keep their activations.
    """
    plan = plan_of(benchmark, 2)
    measured = {1: 22.3, 4: 31.5, 8: 51.3}
    for slots, peak in measured.items():
        assert plan.peak(slots) / 2**30 == pytest.approx(peak, rel=0.03)
    first, last = plan.devices
    assert plan.fullest is first
    assert (last.optimizer, first.activations.logits) == (0, 0)
    assert min(first.optimizer, last.activations.logits) > 0


def with_memory(plan: Any, gib: int) -> Any:
    return dataclasses.replace(plan, available=gib * 2**30)


@pytest.mark.usefixtures("pretended_gpus")
@pytest.mark.parametrize("gpus", [2, 4])
def test_with_borrowed_blocks_each_gpu_has_whole_slots(
    benchmark: Any, gpus: int
) -> None:
    plan = with_memory(plan_of(benchmark, gpus), 140)
    (one,) = plan_of(benchmark, 1).devices
    # Two blocks of 855.6 million weights in 4 bits, with their scales.
    block = 8192 * (2 * 8192 + 2 * 1024 + 3 * 28672)
    bytes_per_weight = 0.5 + 1 / 64 + 4 / (64 * 256)
    assert block == 855_638_016
    for device, home in zip(plan.borrowing, plan.devices, strict=True):
        assert device.base == home.base
        assert device.borrowed == pytest.approx(2 * block * bytes_per_weight, abs=2)
        assert (device.optimizer, device.adapter) == (one.optimizer, one.adapter)
        kinds = ("single", "packed", "evaluating")
        for kind in kinds:
            here, alone = (getattr(d.activations, kind) for d in (device, one))
            assert here == alone
    # The output layer is on the last GPU.
    assert [device.activations.logits > 0 for device in plan.borrowing] == [
        *[False] * (gpus - 1),
        True,
    ]
    assert not plan.borrows_blocks(gpus - 1)
    assert plan.borrows_blocks(gpus)
    # Of the same memory: what one GPU needs for its slots, with less of the base.
    tokens = plan.tokens(3)
    alone = one.peak(3, 3, tokens, tokens)
    last = plan.borrowing[-1]
    expected = alone - one.base + last.base + last.borrowed
    assert plan.peak(3 * gpus) == pytest.approx(expected, rel=1e-3)
    # So many as a GPU holds at most.
    assert plan.need(3 * gpus) == plan.need(3 * gpus - 1) > plan.need(2 * gpus)
    first, second = plan.need(2 * gpus), plan.need(3 * gpus)
    assert plan.further_slot == pytest.approx((second - first) / gpus, rel=0.2)


@pytest.mark.usefixtures("pretended_gpus")
def test_the_way_is_that_for_which_there_is_memory(benchmark: Any) -> None:
    plan = plan_of(benchmark, 2)
    # One slot on each GPU does not fit beside two blocks.
    small = with_memory(plan, 24)
    assert not small.borrows_blocks(2)
    assert small.need(2) == plan.need(2)
    large = with_memory(plan, 140)
    assert large.borrows_blocks(large.slots)
    # No GPU waits for another that has one slot more.
    assert large.slots % 2 == 0
    assert large.slots >= 8
    between = with_memory(plan, 40)
    assert between.borrows_blocks(2)
    assert not between.borrows_blocks(8)
    assert between.borrows_blocks(between.slots)
    assert between.slots >= 2
    for planned in (small, between, large):
        limit = 0.9 * planned.available
        fitting = [slots for slots in range(1, 65) if planned.need(slots) <= limit]
        assert fitting == [*range(1, planned.largest + 1)]


@pytest.mark.usefixtures("pretended_gpus")
def test_more_slots_may_fit_than_fewer(benchmark: Any) -> None:
    """Three take turns in passes of several slots; of four, each GPU has one."""
    plan = with_memory(plan_of(benchmark, 4), 18)
    limit = 0.9 * plan.available
    assert plan.need(3) > limit
    assert plan.need(4) <= limit
    assert plan.largest == plan.slots == 4


@pytest.mark.usefixtures("pretended_gpus")
def test_without_the_decoder_nothing_is_borrowed(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = "finetune.run.planned_base"
    monkeypatch.setattr(f"{base}.supports_gpu_decoder", lambda *_: False)
    plan = with_memory(plan_of(benchmark, 2), 140)
    assert not plan.borrowing
    assert not any(map(plan.borrows_blocks, range(1, 65)))


@pytest.mark.usefixtures("pretended_gpus")
def test_a_study_keeps_the_way_that_its_plan_chooses(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sweeps.study import slot_count

    plan = with_memory(plan_of(benchmark, 2), 140)
    monkeypatch.setattr(slot_count, "plan_memory", lambda *_: plan)
    monkeypatch.setattr(slot_count, "on_gpu", lambda: True)
    monkeypatch.setattr(slot_count, "resolve_checkpointing", lambda config, *_: config)
    config = benchmark.Case(
        *("llama3_3_70b", "ours", "q_v", "short", True, "1", "nf4_double", 8, False),
        2,
    ).config()
    monkeypatch.setattr(slot_count, "spread_gpus", int)
    ways = {
        slots: slot_count.choose_slots(slots, config, True).borrows_blocks
        for slots in (1, 2, 8)
    }
    assert ways == {1: False, 2: True, 8: True}
    choice = slot_count.choose_slots("auto", config, True)
    assert (choice.count, choice.borrows_blocks) == (plan.slots, True)
    # A single job leaves the other GPU without a slot.
    choice = slot_count.choose_slots("auto", config, True, runs=1)
    assert not choice.borrows_blocks
    # More slots fit with borrowed blocks than in turns.
    small = with_memory(plan, 64)
    monkeypatch.setattr(slot_count, "plan_memory", lambda *_: small)
    choice = slot_count.choose_slots("auto", config, False)
    assert not choice.borrows_blocks
    in_turns = dataclasses.replace(small, borrowing=())
    assert choice.count == in_turns.slots < small.slots
    assert in_turns.need(choice.count) <= 0.9 * small.available
