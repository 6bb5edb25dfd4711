"""The buffers through which a GPU borrows the weights of blocks that live on another one."""

import contextlib
from typing import Any

import pytest
import torch
from support.pretend_gpus import GPUS, LABELS, pretend_gpus
from torch import nn

from finetune.engine.packed.gpu.borrowed_blocks import (
    BorrowedBlocks,
    Replica,
    reason_not_borrowed,
)
from finetune.model.quantization import dense_weight

HERE, THERE = GPUS


class TinyBlock(nn.Module):
    def __init__(self, number: int, wide: bool) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.full((4,), float(number)))
        self.q_proj = nn.Linear(4, 6 if wide else 4)
        self.down_proj = nn.Linear(6, 4, bias=False)
        self.register_buffer("scalar", torch.tensor([float(number)]))


class LateCopies:
    """Copies as late as a GPU may, when something waits for them, and notes the order of things."""

    def __init__(self) -> None:
        self.notes: list[tuple[Any, ...]] = []
        self._pending: dict[int, Any] = {}
        self._events = 0

    def start(self, copies: Any, after: Any) -> int:
        self._events += 1
        self._pending[self._events] = copies
        self.notes.append(("copy", copies[0][0].untyped_storage().data_ptr(), after))
        return self._events

    def wait(self, event: int) -> None:
        for target, source in self._pending.pop(event, ()):
            target.copy_(source)

    def mark(self) -> int:
        self._events += 1
        self.notes.append(("mark", self._events))
        return self._events


def make(
    modules: list[nn.Module], lent: list[int], copies: Any = None
) -> tuple[BorrowedBlocks, dict[int, Replica]]:
    """Blocks for `HERE`, of which some live on `THERE`. A block is its module."""
    for number in lent:
        for tensor in [*modules[number].parameters(), *modules[number].buffers()]:
            LABELS.set(tensor, THERE)
    replicas = {number: Replica.of(modules[number], HERE) for number in lent}
    blocks = [
        replicas[number].module if number in replicas else module
        for number, module in enumerate(modules)
    ]
    return BorrowedBlocks(HERE, blocks, replicas, copies), replicas


def tiny_blocks(count: int) -> list[nn.Module]:
    return [TinyBlock(number, wide=number % 2 == 0) for number in range(count)]


def values_of(module: Any) -> list[torch.Tensor]:
    weights = [dense_weight(module.q_proj), dense_weight(module.down_proj)]
    return [*weights, module.q_proj.bias, module.norm, module.scalar]


def go_through(blocks: BorrowedBlocks, modules: list[nn.Module], numbers: Any) -> None:
    """Take blocks in a direction; each must have its own values."""
    direction = 1 if numbers[0] < numbers[-1] else -1
    for number in numbers:
        with blocks.use(number, direction) as block:
            pairs = zip(values_of(block), values_of(modules[number]), strict=True)
            for mine, home in pairs:
                assert torch.equal(mine, home)


@pytest.fixture
def on_gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Those that are pretended; values of two of them may be compared."""
    monkeypatch.setattr("support.pretend_gpus.one_device", lambda *_: HERE)
    with pretend_gpus(monkeypatch):
        yield


@pytest.mark.usefixtures("on_gpus")
@pytest.mark.parametrize("lent", [[0, 1, 2], [3, 4, 5], [0, 2, 3, 5], []])
def test_a_block_has_its_weights_whenever_it_is_taken(lent: list[int]) -> None:
    modules = tiny_blocks(6)
    blocks, replicas = make(modules, lent, LateCopies())
    for _ in range(2):
        go_through(blocks, modules, range(6))
        go_through(blocks, modules, range(5, -1, -1))
    # An evaluation follows a forward pass that an error has cut off.
    go_through(blocks, modules, range(4))
    go_through(blocks, modules, range(6))
    for number, replica in replicas.items():
        module: Any = replica.module
        assert module.norm.data_ptr() != modules[number].norm.data_ptr()  # type: ignore[union-attr]
        assert LABELS.of(module.norm) == LABELS.of(module.scalar) == HERE


@pytest.mark.usefixtures("on_gpus")
def test_two_blocks_are_held_and_no_buffer_is_overwritten_before_it_is_read() -> None:
    modules = tiny_blocks(6)
    copies = LateCopies()
    blocks, replicas = make(modules, [0, 1, 3, 4, 5], copies)
    buffers = {
        view.untyped_storage().data_ptr()
        for views in blocks._views.values()
        for buffer in views
        for view in buffer
    }
    assert len(buffers) == 2
    last_read: dict[int, int] = {}
    for numbers in (range(6), range(5, -1, -1)):
        direction = 1 if numbers[0] == 0 else -1
        for number in numbers:
            first_note = len(copies.notes)
            with blocks.use(number, direction) as block:
                with_weights = [r for r in replicas.values() if is_complete(r)]
                # The one that is computed, and no other.
                assert len(with_weights) == (number in replicas)
                address = block.q_proj.weight.untyped_storage().data_ptr()
            for kind, *note in copies.notes[first_note:]:
                if kind == "copy":
                    buffer, after = note
                    # Waits for all that has been computed from this buffer.
                    assert after == last_read.get(buffer)
                    # The next block's weights don't go where this one's are.
                    assert buffer != address or number == numbers[0]
                else:
                    last_read[address] = note[0]
    copied = [note for note in copies.notes if note[0] == "copy"]
    # On the way back the last two are there.
    assert len(copied) == 5 + 3


def is_complete(replica: Replica) -> bool:
    return replica.module.q_proj.weight.numel() > 0


@pytest.mark.usefixtures("on_gpus")
def test_the_next_block_is_copied_while_one_is_computed() -> None:
    copies = LateCopies()
    blocks, _ = make(tiny_blocks(5), [2, 3], copies)
    started = []
    for number in range(5):
        with blocks.use(number, 1):
            started.append(sum(note[0] == "copy" for note in copies.notes))
    assert started == [1, 1, 2, 2, 2]


@pytest.mark.usefixtures("on_gpus")
def test_after_an_error_the_buffer_waits_for_what_was_launched() -> None:
    copies = LateCopies()
    blocks, replicas = make(tiny_blocks(3), [0, 1, 2], copies)
    with pytest.raises(MemoryError), blocks.use(0, 1):
        raise MemoryError
    assert copies.notes[-1][0] == "mark"
    assert not any(map(is_complete, replicas.values()))


class FailingCopies(LateCopies):
    """The second block's copies fail once, after the first of them."""

    def start(self, copies: Any, after: Any) -> int:
        if len(self.notes) == 1:
            self.notes.append(("failure",))
            target, source = copies[0]
            target.copy_(source)
            raise MemoryError
        return super().start(copies, after)


@pytest.mark.usefixtures("on_gpus")
def test_after_a_copy_that_failed_the_block_is_copied_again() -> None:
    modules = tiny_blocks(4)
    blocks, _ = make(modules, [0, 1, 2, 3], FailingCopies())
    with pytest.raises(MemoryError):
        go_through(blocks, modules, range(4))
    for _ in range(2):
        go_through(blocks, modules, range(4))
        go_through(blocks, modules, [3, 2, 1, 0])


@pytest.mark.parametrize("double", [False, True])
def test_of_a_quantised_block(double: bool) -> None:
    from bitsandbytes.nn import Linear4bit

    block = TinyBlock(3, wide=True)
    for name in ("q_proj", "down_proj"):
        layer = Linear4bit(
            256, 64, bias=True, quant_type="nf4", compress_statistics=double
        )
        setattr(block, name, layer.to("cpu"))
    weight: Any = block.q_proj.weight
    assert weight.quant_state.nested == double
    replica = Replica.of(block, torch.device("cpu"))
    # Packed weights and their scales.
    assert len(replica.tensors) == 4
    blocks = BorrowedBlocks(
        torch.device("cpu"), [replica.module], {0: replica}, LateCopies()
    )
    before = weight.quant_state.absmax.clone()
    with blocks.use(0, 1) as taken:
        for mine, home in zip(values_of(taken), values_of(block), strict=True):
            assert torch.equal(mine, home)
        assert taken.q_proj.weight.data_ptr() != weight.data_ptr()
    assert torch.equal(weight.quant_state.absmax, before)


class Decoder(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([TinyBlock(0, True), block])

    def get_decoder(self) -> "Decoder":
        return self


def test_what_can_not_be_borrowed_is_named() -> None:
    assert reason_not_borrowed(Decoder(TinyBlock(1, False))) is None
    experts = TinyBlock(1, False)
    experts.register_parameter("experts", nn.Parameter(torch.zeros(2, 3, 4)))
    reason = reason_not_borrowed(Decoder(experts))
    assert reason == "a matrix that is no linear layer's (experts)"

    class Linear8bit(nn.Linear):
        pass

    other = TinyBlock(1, False)
    other.q_proj = Linear8bit(4, 4)
    assert reason_not_borrowed(Decoder(other)) == "layers of Linear8bit"
    convolution = TinyBlock(1, False)
    convolution.conv1d = nn.Conv1d(4, 4, 3, groups=4)
    assert reason_not_borrowed(Decoder(convolution)) is None


def test_copies_begin_after_the_buffer_is_read_on_streams_of_both_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the CUDA way does, by streams that note what they are asked."""
    from finetune.model import device_copies

    notes: list[Any] = []
    current: list[Any] = []

    class Stream:
        def __init__(self, device: Any) -> None:
            self.device = device

        def wait_event(self, event: Any) -> None:
            notes.append(("wait", self.device, event))

        def wait_stream(self, other: Any) -> None:
            notes.append(("begin", self.device))

    @contextlib.contextmanager
    def use(stream: Any) -> Any:
        current.append(stream)
        yield
        current.pop()

    class Tensor:
        def __init__(self, device: Any) -> None:
            self.device = device

        def copy_(self, other: Any, non_blocking: bool) -> None:
            streams = {stream.device for stream in current}
            assert streams == {self.device, other.device}
            notes.append(("copy", len(current)))

    def record(device: Any) -> Any:
        notes.append(("record", device, bool(current)))
        return len(notes)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(device_copies, "record_event", record)
    here, there = torch.device("cuda", 0), torch.device("cuda", 1)
    copies: Any = device_copies.DeviceCopies(here)
    read = copies.mark()
    pairs = [(Tensor(here), Tensor(there))] * 2
    copied = copies.start(pairs, read)
    copies.wait(copied)
    assert notes == [
        ("record", here, False),
        ("begin", here),
        ("wait", here, read),
        ("begin", there),
        ("copy", 2),
        ("copy", 2),
        ("record", here, True),
        ("wait", here, copied),
    ]
    # A stream is made once.
    copies.start(pairs, None)
    assert sum(note[0] == "begin" for note in notes) == 2
