"""Recorded steps generate the same tokens as steps that are launched one after another."""

from collections.abc import Callable
from typing import Any

import pytest
from support.architectures import PACKED
from support.packs import Pack, answers_of_slots
from support.recorded_operations import record_operations
from support.runs import Tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("fresh_cache"),
]

RECORDED = "finetune.engine.recorded_steps"
BY_DEFAULT = {"Llama", "Gemma2", "Gemma3Text", "GPTNeoX", "Qwen3Moe"}
"""Full attention, windows, another embedding of positions, experts."""
NOT_RECORDED = {
    # Attention of another implementation than PyTorch's.
    "Gemma2", "GptOss", "GraniteSWA",
    # Experts, whose counts the host waits for.
    "Qwen3Moe", "GraniteMoe", "Glm4MoeLite", "Mixtral", "Qwen2Moe", "Olmoe", "DeepseekV3",
    "Gemma4Text with experts", "Qwen3_5MoeText",
    # States that are no keys and values, or a cache of their own.
    "Qwen3_5Text", "Lfm2", "GraniteMoeHybrid", "FalconH1", "Jamba", "NemotronH", "StableLm",
}  # fmt: skip


@pytest.fixture
def count_recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Records without a GPU; how many steps were recorded so far."""
    recorded: list[bool] = []

    def record(launch: Callable[[], None]) -> Callable[[], None]:
        replay = record_operations(launch)
        recorded.append(True)
        return replay

    monkeypatch.setattr(f"{RECORDED}._is_on_one_gpu", lambda base: True)
    monkeypatch.setattr(f"{RECORDED}.recorder", lambda: record)
    monkeypatch.setattr(f"{RECORDED}.end_recording", lambda: None)
    return lambda: len(recorded)


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.slow)
        for name in PACKED
    ],
)
def test_recorded_answers_are_those_of_each_alone(
    architecture: str,
    tiny: Tiny,
    count_recorded: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Rows are longer than the tiny windows.
    monkeypatch.setattr("finetune.engine.allocated_cache.WINDOWS_OF_A_STEP", 100)
    answers, alone = answers_of_slots(Pack(architecture, tiny), 24)
    assert answers == alone
    assert (count_recorded() > 0) is (architecture not in NOT_RECORDED)


@pytest.mark.parametrize("rounds", [False, True])
def test_a_base_that_counts_its_tokens_itself_is_not_recorded(
    rounds: bool,
    tiny: Tiny,
    count_recorded: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if rounds:
        # As in 16 bits: the median token is compared.
        for module in ("batch_decoding", "probes"):
            name = f"finetune.engine.{module}.computes_exactly"
            monkeypatch.setattr(name, lambda model: False)
    pack = Pack("Llama", tiny)
    decoder = pack.bank.base.model
    forward = decoder.forward
    # Then the position of a step is a number of Python's.
    decoder.forward = lambda position_ids, **inputs: forward(**inputs)

    with caplog.at_level("INFO"):
        answers, alone = answers_of_slots(pack, 24)

    assert answers == alone
    assert count_recorded() == 1  # by the probe
    assert "generating tokens without recorded steps" in caplog.text


def test_steps_that_cannot_be_recorded_are_launched_and_one_line_says_so(
    tiny: Tiny,
    count_recorded: Callable[[], int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    pack = Pack("Llama", tiny)
    decoder = pack.bank.base.model
    forward = decoder.forward

    def waiting(**inputs: Any) -> Any:
        assert inputs["input_ids"].sum().item() >= 0
        return forward(**inputs)

    decoder.forward = waiting

    with caplog.at_level("INFO"):
        answers, alone = answers_of_slots(pack, 24)
        again, _ = answers_of_slots(pack, 24)

    assert answers == alone == again
    assert count_recorded() == 0
    assert caplog.text.count("without recorded steps") == 1
    assert "forward" not in vars(pack.bank.base)


def test_a_step_is_recorded_once_while_no_row_leaves(
    tiny: Tiny, count_recorded: Callable[[], int]
) -> None:
    pack = Pack("Llama", tiny)
    answers_of_slots(pack, 4)
    before = count_recorded()

    answers, alone = answers_of_slots(pack, 60, texts=("Hm?",), ends=[])

    assert answers == alone
    assert {len(tokens) for of_slot in answers for tokens in of_slot} == {60}
    assert count_recorded() == before + 1


def test_where_memory_is_short_steps_are_launched_and_recorded_the_next_time(
    tiny: Tiny, count_recorded: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    pack = Pack("Llama", tiny)
    _, alone = answers_of_slots(pack, 24)
    before = count_recorded()

    def full(launch: Callable[[], None]) -> Callable[[], None]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(f"{RECORDED}.recorder", lambda: full)
        assert answers_of_slots(pack, 24)[0] == alone
    assert count_recorded() == before
    assert answers_of_slots(pack, 24)[0] == alone
    assert count_recorded() > before


def test_a_diverged_adapter_leaves_the_others_their_recorded_steps(
    tiny: Tiny, count_recorded: Callable[[], int]
) -> None:
    pack = Pack("Llama", tiny)
    vector = pack.slots[0].vector.clone()
    pack.slots[0].vector.fill_(float("nan"))
    pack.slots[0].refresh_weights()
    answers_of_slots(pack, 4)
    pack.slots[0].vector.copy_(vector)
    pack.slots[0].refresh_weights()
    before = count_recorded()

    answers, alone = answers_of_slots(pack, 24)

    assert answers == alone
    assert count_recorded() > before


def test_rows_much_longer_than_a_window_are_not_recorded(
    tiny: Tiny, count_recorded: Callable[[], int]
) -> None:
    pack = Pack("Gemma3Text", tiny)
    window = pack.bank.base.config.sliding_window

    answers, alone = answers_of_slots(pack, 2 * window + 1)

    assert answers == alone
    assert count_recorded() == 0
