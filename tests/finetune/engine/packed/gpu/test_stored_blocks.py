"""With checkpointing, as many blocks keep their activations as memory allows."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.decoder_bases import random_base
from support.decoder_passes import make_slots, train

MODULE = "finetune.engine.packed.gpu.stored_blocks"
GIB = 2**30
MIB = 2**20


def test_what_is_stored_fits_beside_the_rest_of_the_pass() -> None:
    from finetune.engine.packed.gpu.stored_blocks import (
        BlockMemory,
        count_fewest,
        count_most,
    )

    def taken(blocks: int) -> int:
        return (blocks + 2) * activations + layers * MIB + weights

    draw = random.Random(0)
    for _ in range(2000):
        layers, slots = draw.randint(1, 100), draw.randint(1, 64)
        activations = draw.choice([2, 100, 8000]) * MIB + draw.randint(0, 9)
        weights, usable = draw.randint(0, GIB), draw.randint(-GIB, 200 * GIB)
        block = BlockMemory(activations, block_input=MIB, weights=weights)

        stored = count_most(layers, slots, block, usable)

        fewest = count_fewest(layers, slots)
        assert 1 <= fewest <= stored <= layers
        assert stored == fewest or taken(stored) <= usable
        # One more would not fit.
        assert stored == layers or taken(stored + 1) > usable


@pytest.mark.parametrize(
    ("slots", "fewest"), [(1, 1), (2, 4), (16, 4)], ids=["alone", "two", "many"]
)
def test_the_fewest_are_those_that_cost_next_to_nothing(
    slots: int, fewest: int
) -> None:
    from finetune.engine.packed.gpu.stored_blocks import count_fewest

    assert count_fewest(32, slots) == fewest


@pytest.fixture
def gpu_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Say that so many blocks of the next passes fit into memory: a CPU's is not looked at."""
    allocated = 0

    def advance(device: object) -> int:
        nonlocal allocated
        allocated += 1000 * MIB
        return allocated

    def limit(blocks: float) -> None:
        nonlocal allocated
        allocated = 0
        # Beside the first block, before whose forward pass 1000 MiB are allocated, and two blocks
        # for the backward pass.
        size = (1 + 2 + blocks) * 1000 * MIB
        monkeypatch.setattr(f"{MODULE}.available_memory", lambda: size / 0.9 + 9 * MIB)

    monkeypatch.setattr("finetune.engine.packed.gpu.blocks.allocated_memory", advance)
    monkeypatch.setattr(f"{MODULE}.allocated_memory", advance)
    return limit


@pytest.fixture
def recomputed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks each pass computes again."""
    from finetune.engine.packed.gpu.blocks import DecoderBlocks

    counts: list[int] = []
    backward = DecoderBlocks.backward

    def counting(self: DecoderBlocks, trace: Any, gradient: Any) -> Any:
        import torch

        inputs = [block for block in trace.blocks if isinstance(block, torch.Tensor)]
        counts.append(len(inputs))
        return backward(self, trace, gradient)

    monkeypatch.setattr(DecoderBlocks, "backward", counting)
    return counts


@pytest.mark.slow
def test_a_pass_is_the_same_however_many_blocks_are_stored(
    tiny: Any,
    tiny_base: Path,
    tmp_path: Path,
    gpu_memory: Callable[[float], None],
    recomputed: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import torch

    from finetune.engine.packed.gpu.block import Block
    from finetune.engine.packed.requests import ForwardBackward

    folder = random_base("llama", tiny_base, tmp_path / "base")
    slots = make_slots(tiny, folder, dropout=0.3, saves="partial")[:2]
    lengths = [[3, 5], [4]]
    recomputed.clear()  # the probe's
    figures = []
    for blocks in (0.5, 2.5, 9):
        gpu_memory(blocks)
        figures.append(train(slots, lengths))
    # One of three blocks is stored anyway.
    assert recomputed == [2, 1, 0]
    for losses, gradients in figures[1:]:
        assert losses == figures[0][0]
        assert all(map(torch.equal, gradients, figures[0][1]))

    backend = slots[0].bank.backends.current
    # An evaluation would gain nothing.
    assert backend.release_memory(trains=False) is None

    # Memory that is shorter than it seemed.
    forward = Block.forward
    calls = iter(range(100))

    def short(self: Block, *arguments: Any, **options: Any) -> Any:
        if next(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *arguments, **options)

    monkeypatch.setattr(Block, "forward", short)
    bank = slots[0].bank
    gpu_memory(9)
    request = ForwardBackward(slots[0], [{"input_ids": [1, 2], "labels": [1, 2]}], 1, 1)
    with caplog.at_level("WARNING"):
        (result,) = bank.execute([request])
    assert not isinstance(result, Exception)
    assert bank.capacity is None
    assert caplog.messages == [
        "memory is short: fewer blocks keep their activations from now on, which is slower"
    ]
    # From now on, whatever memory says.
    gpu_memory(9)
    bank.execute([request])
    assert recomputed[-2:] == [2, 2]
    assert len(caplog.messages) == 1


def test_what_only_makes_passes_faster_is_given_up_until_a_pass_fits(
    caplog: pytest.LogCaptureFixture,
) -> None:
    import torch

    from finetune.engine.packed.execution import Execution

    changes = ["blocks", "records"]
    states = []

    def compute(requests: Any) -> list[Any]:
        states.append(list(changes))
        if changes:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [None for _ in requests]

    def release(trains: bool) -> str | None:
        assert not trains
        return changes.pop(0) if changes else None

    execution = Execution(compute, release)
    with caplog.at_level("WARNING"):
        assert execution.execute([object(), object()]) == [None, None]
    assert states == [["blocks", "records"], ["records"], []]
    assert caplog.messages == [
        f"memory is short: {change}, which is slower"
        for change in ("blocks", "records")
    ]
    assert execution.capacity is None

    def broken(requests: Any) -> list[Any]:
        raise ValueError("not the memory")

    # Another error gives nothing up.
    changes.append("blocks")
    (error,) = Execution(broken, release).execute([object()])
    assert isinstance(error, ValueError)
    assert changes == ["blocks"]


@pytest.fixture
def two_kinds_of_blocks() -> Any:
    """Three blocks, of which the last computes three times as many columns as the others."""
    from torch.nn import Linear, ModuleList, Sequential

    return ModuleList([Linear(8, 10), Linear(8, 10), Sequential(Linear(8, 30))])


def test_the_largest_block_and_recorded_passes_leave_room_for_fewer(
    two_kinds_of_blocks: Any, gpu_memory: Callable[[float], None]
) -> None:
    import torch

    from finetune.engine.packed.gpu.blocks import allocated_memory
    from finetune.engine.packed.gpu.stored_blocks import StoredBlocks

    def count_most(
        blocks: Any, memory: float, recorded: int = 0, logits: int = 0
    ) -> int:
        gpu_memory(memory)
        stored = StoredBlocks(blocks, "partial", logits)
        stored.begin_pass(recorded)
        before = allocated_memory(torch.device("cpu"))
        assert before is not None
        return stored.count_most(1, torch.zeros(1), before)

    equal = two_kinds_of_blocks[:2]
    assert [count_most(equal, blocks) for blocks in (1.5, 2.5)] == [1, 2]
    assert count_most(equal, 2.5, recorded=900 * MIB) == 1
    assert count_most(equal, 2.5, logits=900 * MIB) == 1
    # 3000 MiB each: one that is stored anyway, two for the backward pass, and one more.
    assert [count_most(two_kinds_of_blocks, blocks) for blocks in (9.5, 10.5)] == [1, 2]


def test_only_a_pass_that_has_stored_more_gives_it_up(
    two_kinds_of_blocks: Any, gpu_memory: Callable[[float], None]
) -> None:
    import torch

    from finetune.engine.packed.gpu.stored_blocks import StoredBlocks

    stored = StoredBlocks(two_kinds_of_blocks, "partial", logits=0)
    x = torch.zeros(1)
    assert not stored.give_up()
    gpu_memory(99)
    stored.begin_pass(0)
    assert stored.count_most(1, x, 0) == 3
    # The next pass is recorded.
    stored.begin_pass(0)
    assert not stored.give_up()
    gpu_memory(99)
    assert stored.count_most(1, x, 0) == 3
    assert stored.give_up()
    assert not stored.give_up()
    gpu_memory(99)
    assert stored.count_most(1, x, 0) == 1
