"""The plan of `trainer.gradient_checkpointing=partial` on a GPU."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from finetune.config.schema import RunConfig
from finetune.model.memory import GIB, USABLE
from finetune.run.plan import Plan

LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
QWEN3_5_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9216,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
GEMMA4_E2B = {
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "global_head_dim": 512,
    "num_kv_shared_layers": 20,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 256,
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
}
BASES = {
    "llama": ("Llama", LLAMA_7B, 4 * GIB),
    "qwen3_5": ("Qwen3_5Text", QWEN3_5_4B, 3 * GIB),
    "gemma4": ("Gemma4Text", GEMMA4_E2B, 3 * GIB),
}
SHORT, LONG = (1300,) * 20, (8192,) * 20


@pytest.fixture
def plan_of(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Plan]:
    """Plans of a GPU of 24 GiB."""
    import transformers

    from finetune.run.decoder_memory import RecordedMemory, StoredMemory
    from finetune.run.device_memory import DeviceMemory
    from finetune.run.memory_costs import gpu_activations

    monkeypatch.setattr("finetune.run.plan.on_gpu", lambda: True)

    def plan(
        checkpointing: str, base: str = "llama", batches: tuple[int, ...] = LONG
    ) -> Plan:
        architecture, sizes, size = BASES[base]
        shapes = getattr(transformers, f"{architecture}Config")(**sizes)
        config = tiny(f"trainer.gradient_checkpointing={checkpointing}")
        targets = {"q_proj", "v_proj"}
        tokens = max(batches)
        activations = gpu_activations(shapes, config, targets, 2, tokens, 100, None)
        device = DeviceMemory(
            process=0,
            base=size,
            experts=0,
            adapter=GIB // 4,
            optimizer=GIB // 4,
            activations=activations,
            batch_tokens=tokens,
            held=0,
            recorded=RecordedMemory.read(shapes, 2),
            stored=StoredMemory.read(shapes, config, targets, 2),
        )
        return Plan((device,), 24 * GIB, batches, sum(batches), 7 * 10**9)

    return plan


def with_memory(plan: Plan, gib: float) -> Plan:
    return dataclasses.replace(plan, available=int(gib * GIB))


@pytest.mark.parametrize("base", BASES)
def test_needs_what_the_fewest_blocks_need_and_takes_what_there_is(
    plan_of: Callable[..., Plan], base: str
) -> None:
    # Enough tokens for a pass not to be recorded.
    batches = (20_000,) * 20 if base == "gemma4" else LONG
    partial, fewest, whole = (
        plan_of(saves, base, batches) for saves in ("partial", "true", "false")
    )
    assert fewest.peak() == fewest.need() == partial.need()
    assert whole.peak() == whole.need()
    peaks = []
    for gib in (7, 12, 16, 24, 48, 99):
        plan = with_memory(partial, gib)
        assert plan.largest == with_memory(fewest, gib).largest
        if plan.largest:
            assert plan.peak() <= USABLE * plan.available
        peaks.append(plan.peak())
    assert peaks == sorted(peaks)
    assert peaks[0] == fewest.need()
    assert peaks[3] > 1.5 * fewest.need()
    # With memory for all blocks it takes what it takes without checkpointing.
    assert peaks[-1] == whole.need()


def test_fewer_slots_leave_memory_for_more_blocks(
    plan_of: Callable[..., Plan],
) -> None:
    plan = plan_of("partial")
    assert plan_of("true").slots == 2
    assert plan.slots == 1
    assert with_memory(plan, 80).slots == 2
    # Of short rows, one slot would dequantise again what it computes again, and several gain.
    short = plan_of("partial", batches=(2600,) * 20)
    assert [with_memory(short, gib).slots for gib in (8, 80)] == [1, 4]
    assert with_memory(short, 12).slots > 1


def test_recorded_passes_store_the_fewest(plan_of: Callable[..., Any]) -> None:
    partial, fewest = (plan_of(saves, batches=SHORT) for saves in ("partial", "true"))
    assert partial.peak(1) == fewest.peak(1)
    assert partial.peak(2) > fewest.peak(2)


def test_other_runs_need_their_peak(plan_of: Callable[..., Any]) -> None:
    """Also where the largest pass is just too large to be recorded, and others are recorded."""
    batches = tuple(range(1000, 2500, 7))
    for saves in ("true", "false"):
        plan = plan_of(saves, batches=batches)
        for slots in (1, 2, 5):
            assert plan.peak(slots) == plan.need(slots)
