"""Padded and recorded passes compute what passes of their exact size compute."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.decoder_bases import ARCHITECTURES, random_base
from support.decoder_passes import evaluate, make_slots, train
from support.matrix import further

RECORDING = "finetune.engine.packed.gpu.pass_recorder"
RECORDER = f"{RECORDING}.PassRecorder"


def bases() -> Any:
    """One base in the slow tests, all others with the large tables."""
    others = [name for name in ARCHITECTURES if name not in ("llama", "phi3")]
    return pytest.mark.parametrize("architecture", ["llama", *further(*others)])


all_bases = pytest.mark.parametrize(
    "architecture", [name for name in ARCHITECTURES if name != "phi3"]
)

LENGTHS = [[3, 14], [8], [5, 6, 7]]


@pytest.mark.matrix
@bases()
def test_padding_changes_no_loss_and_no_gradient(
    architecture: str, tiny: Any, tiny_base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    folder = random_base(architecture, tiny_base, tmp_path / "base")
    slots = make_slots(tiny, folder, dropout=0.3, saves=True)
    losses, gradients = train(slots, LENGTHS)
    monkeypatch.setattr(f"{RECORDER}.is_worthwhile", lambda *_: True)
    monkeypatch.setattr(f"{RECORDER}.find", lambda *_: None)

    padded_losses, padded_gradients = train(slots, LENGTHS)

    assert padded_losses == pytest.approx(losses, rel=1e-6)
    for padded, gradient in zip(padded_gradients, gradients, strict=True):
        assert float(gradient.norm()) > 0
        assert float((padded - gradient).norm() / gradient.norm()) < 1e-5


def repeating_pool() -> Any:
    """Where there is no GPU: what is recorded is launched again."""
    from finetune.engine.packed.gpu.recorded_pass import PassPool

    class RepeatingPool(PassPool):
        def __init__(self) -> None:
            self._buffers = []

        def buffers(self, x: Any) -> tuple[Any, Any]:
            # A recording computes nothing, so that it may read what no batch has written yet.
            first, second = super().buffers(x)
            return first.zero_(), second.zero_()

        def record(self, launch: Callable[[], None]) -> Callable[[], None]:
            launch()
            return launch

    return RepeatingPool()


def record_on_cpu(slots: list[Any], monkeypatch: Any) -> Any:
    """Let the bank of slots record its passes without a GPU, and return its recorder."""
    monkeypatch.setattr(f"{RECORDER}.is_worthwhile", lambda *_: True)
    monkeypatch.setattr(f"{RECORDING}._is_free", lambda memory: True)
    # The interpreter's time grows with the tokens.
    monkeypatch.setattr("finetune.engine.packed.gpu.pass_size.MIN_STEP", 16)
    pool = repeating_pool()
    monkeypatch.setattr(f"{RECORDING}.PassPool", lambda: pool)
    return slots[0].bank.backends.current._recorder


@pytest.mark.slow
@bases()
def test_a_recorded_pass_reads_the_rows_and_slots_of_each_batch(
    architecture: str, tiny: Any, tiny_base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    folder = random_base(architecture, tiny_base, tmp_path / "base")
    slots = make_slots(tiny, folder, dropout=0.3, saves=False)
    cases = [
        (slots, [[3, 7], [4], [6]]),
        # Fewer slots in another order, with other rows, among them a longer one.
        (slots[1::-1], [[15, 2], [10]]),
        # Fewer tokens: padded to the size that is recorded.
        (slots[:2], [[4], [3]]),
    ]
    expected = [train(some, lengths, 5) for some, lengths in cases]
    recorder = record_on_cpu(slots, monkeypatch)

    train(*cases[0], 5)  # what is met for the first time is not recorded yet
    results = [train(some, lengths, 5) for some, lengths in cases]

    # All batches are computed by it: a pass of another size would have been met, and launched.
    assert len(recorder._recorded) == 1
    assert not recorder._met
    for (losses, gradients), (known_losses, known) in zip(
        results, expected, strict=True
    ):
        assert losses == pytest.approx(known_losses, rel=1e-6)
        for one, other in zip(gradients, known, strict=True):
            assert float((one - other).norm() / other.norm()) < 1e-5


@pytest.mark.slow
@bases()
def test_a_recorded_evaluation_reads_the_rows_and_slots_of_each_batch(
    architecture: str, tiny: Any, tiny_base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    folder = random_base(architecture, tiny_base, tmp_path / "base")
    slots = make_slots(tiny, folder, dropout=0.3, saves=False)
    cases = [(slots, [[3, 7], [4], [6]]), (slots[1::-1], [[15, 2], [10]])]
    expected = [evaluate(some, lengths, 5) for some, lengths in cases]
    recorder = record_on_cpu(slots, monkeypatch)

    for _ in range(3):
        evaluate(*cases[0], 5)
    # Not before training: memory of its own would be in no plan.
    assert not recorder._recorded
    for _ in range(2):
        train(slots, LENGTHS, 5)
    results = [evaluate(some, lengths, 5) for some, lengths in cases]

    assert [key.kind.trains for key in recorder._recorded] == [True, False]
    assert not recorder._met
    for evaluations, others in zip(results, expected, strict=True):
        for one, other in zip(evaluations, others, strict=True):
            assert one.row_losses == pytest.approx(other.row_losses, rel=1e-6)
            assert one.row_tokens == other.row_tokens
            assert one.row_correct == other.row_correct


def test_a_batch_is_padded_to_a_size_that_is_there_while_that_costs_little() -> None:
    import torch

    from finetune.engine.packed.gpu import pass_recorder
    from finetune.engine.packed.gpu.pass_recorder import PassKind, PassRecorder
    from finetune.engine.packed.gpu.pass_size import PassSize

    weights = 10**6
    blocks: Any = None
    recorder = PassRecorder(blocks, weights, hidden_size=1000)
    kind = PassKind(True, True, frozenset(["up_proj"]), True, False)
    context: Any = SimpleNamespace(query_scales=None)

    def met(size: PassSize) -> None:
        recorder.remember(kind, size, torch.empty(size.tokens, 1000), context, 0)

    small = PassSize(tokens=1024, slots=8, spans=32, rank=16)
    large = PassSize(tokens=2048, slots=16, spans=64, rank=16)
    assert recorder.choose_size(kind, small) == small
    met(large)
    assert recorder.choose_size(kind, small) == large
    assert recorder.choose_size(kind, large) == large
    others = [
        PassSize(tokens=1000, slots=8, spans=32, rank=16),  # more than twice as many
        PassSize(tokens=1024, slots=32, spans=32, rank=16),
        PassSize(tokens=1024, slots=8, spans=128, rank=16),
        PassSize(tokens=1024, slots=8, spans=32, rank=32),
    ]
    for other in others:
        assert recorder.choose_size(kind, other) == other
    evaluation = dataclasses.replace(kind, trains=False)
    assert recorder.choose_size(evaluation, small) == small
    # Once the padding has cost more than a recording is worth, it gets a size of its own.
    uses = 1
    while recorder.choose_size(kind, small) == large:
        uses += 1
    products = 1024 * (weights + 2 * 16 * weights // 1000) + 1024**2 * 1000
    assert uses == pass_recorder.RECORDING_PRODUCTS // products
    met(small)
    for _ in range(2 * uses):
        assert recorder.choose_size(kind, small) == small


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 2047, 2049, 30_000])
@pytest.mark.parametrize("rows", [1, 7, 8, 64])
def test_a_size_has_room_for_the_batch_and_little_more(tokens: int, rows: int) -> None:
    import torch

    from finetune.engine.packed.batch import pack_rows
    from finetune.engine.packed.gpu.pass_size import pass_size

    row = {"input_ids": [1] * (tokens + 1), "labels": [-100] * tokens + [1]}
    batches = [[row] for _ in range(rows)]
    batch = pack_rows(batches, torch.device("cpu"))

    size = pass_size(batch)

    total = tokens * rows
    assert total <= size.tokens <= max(total * (1 + 1 / 16) + 1, total + 127)
    assert size.slots > rows
    assert size.spans > rows
    tiles = rows * -(-tokens // 16)
    assert size.tiles(16) >= tiles
    assert size.blocks(16) >= tiles


@pytest.fixture
def count_recorded(monkeypatch: Any) -> Callable[[], int]:
    """How many passes were recorded so far."""
    from finetune.engine.packed.gpu.pass_recorder import PassRecorder
    from finetune.engine.packed.gpu.recorded_pass import RecordedPass

    recorded: list[bool] = []
    record = PassRecorder._record

    def counting(self: PassRecorder, *arguments: Any) -> RecordedPass | None:
        result = record(self, *arguments)
        # Not the pass itself, whose memory would stay.
        recorded.append(result is not None)
        return result

    monkeypatch.setattr(f"{RECORDER}._record", counting)
    return lambda: sum(recorded)


@pytest.mark.gpu
@pytest.mark.parametrize("saves", [True, False])
@all_bases
def test_a_recorded_pass_is_the_pass_that_is_launched(
    architecture: str,
    saves: bool,
    tiny: Any,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: Any,
    count_recorded: Callable[[], int],
) -> None:
    """Also with other rows, with other slots, and in another order."""
    import torch

    folder = random_base(architecture, tiny_base, tmp_path / "base")
    slots = make_slots(tiny, folder, dropout=0.3, saves=saves)
    cases = [
        (slots, LENGTHS),
        (slots[::-1], LENGTHS),
        (slots, [[9, 2], [3], [7, 7, 7]]),
        (slots[:2], [[30, 10], [20]]),
        (slots[1:], [[4], [12, 1]]),
    ]
    with monkeypatch.context() as patched:
        patched.setattr(f"{RECORDER}.find", lambda *_: None)
        launched = [train(some, lengths, 5) for some, lengths in cases]
    assert count_recorded() == 0
    for _ in range(3):
        for (some, lengths), (losses, gradients) in zip(cases, launched, strict=True):
            replayed_losses, replayed = train(some, lengths, 5)
            assert replayed_losses == losses
            for one, other in zip(replayed, gradients, strict=True):
                assert torch.equal(one, other)
    assert count_recorded() > 0


@pytest.mark.gpu
@all_bases
def test_a_recorded_evaluation_is_the_evaluation_that_is_launched(
    architecture: str,
    tiny: Any,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: Any,
    count_recorded: Callable[[], int],
) -> None:
    """Also between passes that train, with which it shares memory."""
    import torch

    folder = random_base(architecture, tiny_base, tmp_path / "base")
    slots = make_slots(tiny, folder, dropout=0.3, saves=False)
    cases = [
        (slots, LENGTHS),
        (slots[:2], [[30, 10], [20]]),
        (slots[:1], [[7, 5, 3]]),
    ]
    with monkeypatch.context() as patched:
        patched.setattr(f"{RECORDER}.find", lambda *_: None)
        launched = [evaluate(some, lengths, 5) for some, lengths in cases]
        trained = train(slots, LENGTHS, 5)
    assert count_recorded() == 0
    for _ in range(4):
        for (some, lengths), evaluations in zip(cases, launched, strict=True):
            assert evaluate(some, lengths, 5) == evaluations
            losses, gradients = train(slots, LENGTHS, 5)
            assert losses == trained[0]
            assert all(map(torch.equal, gradients, trained[1]))
    assert count_recorded() > 1


@pytest.mark.gpu
def test_what_cannot_be_recorded_is_launched_and_said_once(
    tiny: Any, tiny_base: Path, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    import torch

    from finetune.engine.packed.gpu.blocks import DecoderBlocks

    folder = random_base("llama", tiny_base, tmp_path / "base")
    slots = make_slots(tiny, folder, dropout=0.0, saves=False)
    expected = train(slots, LENGTHS)
    forward = DecoderBlocks.forward

    def waiting(self: DecoderBlocks, x: Any, *arguments: Any, **options: Any) -> Any:
        x.sum().item()  # the host waits for the GPU: cannot be recorded
        return forward(self, x, *arguments, **options)

    monkeypatch.setattr(DecoderBlocks, "forward", waiting)
    for _ in range(3):
        losses, gradients = train(slots, LENGTHS)
        assert losses == expected[0]
        assert all(map(torch.equal, gradients, expected[1]))
    said = [record for record in caplog.records if "recorded" in record.message]
    assert len(said) == 1


@pytest.mark.gpu
def test_memory_of_recorded_passes_is_given_back_where_it_is_short(
    tiny: Any, tiny_base: Path, tmp_path: Path
) -> None:
    from finetune.model.memory import free_memory

    folder = random_base("llama", tiny_base, tmp_path / "base")
    slots = make_slots(tiny, folder, dropout=0.0, saves=False)
    expected = train(slots, LENGTHS)
    train(slots, LENGTHS)
    backend = slots[0].bank.backends.current
    import torch

    free_memory()
    before = torch.cuda.memory_reserved()

    assert backend.release_memory(trains=True)
    assert not backend.release_memory(trains=True)

    free_memory()
    assert torch.cuda.memory_reserved() < before
    assert train(slots, LENGTHS)[0] == expected[0]


@pytest.mark.gpu
def test_no_memory_stays_of_each_base_whose_passes_were_recorded(
    tiny: Any,
    tiny_base: Path,
    tmp_path: Path,
    count_recorded: Callable[[], int],
) -> None:
    import torch

    from finetune.model.memory import free_memory

    folder = random_base("llama", tiny_base, tmp_path / "base")
    allocated = []
    for number in range(3):
        slots = make_slots(tiny, folder, dropout=0.0, saves=False)
        train(slots, LENGTHS)
        train(slots, LENGTHS)
        assert count_recorded() == number + 1
        del slots
        free_memory()
        allocated.append(torch.cuda.memory_allocated())
    # The first one leaves what matrix products keep for themselves.
    assert allocated[2] == allocated[1]
