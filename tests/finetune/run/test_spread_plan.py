"""The planned memory of a base that is spread over several GPUs."""

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
    monkeypatch.setattr(f"{base}.on_gpu", lambda: True)
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
