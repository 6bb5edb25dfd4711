"""Runs that train together: what one lacks or breaks is its own, they judge at the same time, and
each is itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.runs import (
    NF4,
    NONE,
    PACKED,
    SHORT,
    TRL,
    Alone,
    Tiny,
    final,
    losses,
    train_in_slots,
)

from finetune.config.schema import RunConfig
from finetune.run.context import RunContext
from finetune.run.resources import SharedResources


@pytest.mark.parametrize(
    ("what", "slots"),
    [
        pytest.param(
            what,
            slots,
            marks=() if (what, slots) == ("forward_backward", 5) else pytest.mark.slow,
        )
        for what in ("forward_backward", "evaluate")
        for slots in (4, 5)
    ],
)
def test_too_little_memory_makes_the_pack_smaller_and_loses_no_run(
    what: str,
    slots: int,
    tiny: Tiny,
    alone: Alone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from finetune.engine.packed.bank import Bank

    real, sizes = getattr(Bank, what), []

    def small(bank: Bank, requests: Any) -> Any:
        sizes.append(len(requests))
        if len(requests) > 2:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB"
            )
        return real(bank, requests)

    configs = [
        tiny(*SHORT, f"seed={seed}", "lora.dropout=0.1", f"lora.r={seed + 2}")
        for seed in range(slots + 3)
    ]
    resources = SharedResources()
    with monkeypatch.context() as patched:
        patched.setattr(Bank, what, small)
        places = train_in_slots(configs, tmp_path, slots, resources)

    assert resources.bank(configs[0]).capacity == 2, "not what memory has room for"
    assert [size for size in sizes if size > 2] == [slots], "tried again and again"
    assert [final(place)["status"] for place in places] == ["completed"] * len(configs)
    later = [str(number) for number in range(slots, slots + 3)]
    assert final(places[slots])["companions"] == later[1:2], (
        "more have begun than there is memory for"
    )
    for config, place in zip(configs, places, strict=True):
        assert losses(place) == pytest.approx(alone(config), rel=1e-5)


def test_memory_that_is_too_small_for_one_is_that_ones_error(
    tiny: Tiny, alone: Alone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large batch of one run fits into no pack, nor alone; the others' do."""
    import torch

    from finetune.engine.packed.bank import Bank

    real = Bank.forward_backward

    def small(bank: Bank, requests: Any) -> Any:
        if sum(len(request.rows) for request in requests) > 6:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB"
            )
        return real(bank, requests)

    sizes = (2, 8, 3)
    configs = [
        tiny(*SHORT, f"trainer.per_device_train_batch_size={size}") for size in sizes
    ]
    errors: dict[int, Exception] = {}
    with monkeypatch.context() as patched:
        patched.setattr(Bank, "forward_backward", small)
        places = train_in_slots(configs, tmp_path, 3, errors=errors)

    assert [*errors] == [1]
    assert isinstance(errors[1], torch.OutOfMemoryError)
    assert "out of memory" in final(places[1])["error"]
    for number in (0, 2):
        assert losses(places[number]) == pytest.approx(alone(configs[number]), rel=1e-5)


@pytest.mark.parametrize("when", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_an_error_in_one_runs_batch_reaches_that_run_alone(
    when: int, tiny: Tiny, alone: Alone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.engine.packed.bank import Bank

    real = Bank.forward_backward

    def breaks(bank: Bank, requests: Any) -> Any:
        if any(
            request.slot.seed == 1 and request.dropout_step == when
            for request in requests
        ):
            real(bank, requests)  # as far as to the gradients
            raise ValueError("index out of range")
        return real(bank, requests)

    configs = [tiny(*SHORT, f"seed={seed}", "lora.dropout=0.2") for seed in range(4)]
    errors: dict[int, Exception] = {}
    resources = SharedResources()
    with monkeypatch.context() as patched:
        patched.setattr(Bank, "forward_backward", breaks)
        places = train_in_slots(configs, tmp_path, 3, resources, errors=errors)

    assert {number: str(error) for number, error in errors.items()} == {
        1: "index out of range"
    }
    assert [final(place)["status"] for place in places] == [
        "completed",
        "failed",
        "completed",
        "completed",
    ]
    assert final(places[1])["step"] == when - 1
    assert final(places[3])["companions"] == ["0", "2"], (
        "the slot that is free takes the next run at once"
    )
    assert resources.bank(configs[0]).capacity is None
    for number in (0, 2, 3):
        assert losses(places[number]) == pytest.approx(alone(configs[number]), rel=1e-5)


class Careful(SharedResources):
    """SharedResources that let go of no base on which runs train."""

    def drop(self, kind: str) -> None:
        bank = self._kept.get(kind, (None, None))[1]
        assert kind != "bank" or bank is None or not bank.slots_in_use
        super().drop(kind)


@pytest.mark.parametrize(
    "jobs",
    [
        ((NONE,), (NF4,), (NONE,)),
        ((TRL,), (PACKED,), (TRL, "seed=1")),
        *(
            pytest.param(jobs, marks=pytest.mark.slow)
            for jobs in (
                ((TRL,), (TRL, "lora.r=4")),
                ((PACKED,), (TRL,), (PACKED, "seed=1")),
                (
                    (NF4, "trainer.gradient_checkpointing=true"),
                    (NONE, TRL),
                    (NF4,),
                    (NONE, PACKED),
                    (NF4, TRL),
                ),
                ((TRL, "lora.bias=all"), (PACKED,), (TRL,)),
            )
        ),
    ],
    ids=lambda jobs: "_".join(",".join(job) for job in jobs),
)
def test_runs_that_cannot_share_a_base_wait_for_each_other(
    jobs: tuple[tuple[str, ...], ...], tiny: Tiny, alone: Alone, tmp_path: Path
) -> None:
    configs = [tiny(*SHORT, *job) for job in jobs]
    places = train_in_slots(configs, tmp_path, 3, Careful())
    for config, place in zip(configs, places, strict=True):
        assert final(place)["status"] == "completed"
        assert losses(place) == pytest.approx(alone(config), rel=1e-5)
        assert (
            final(place)["metrics"]["eval/loss"]
            < final(place)["metrics"]["train/loss"] + 1
        )


def test_what_fails_between_two_runs_is_said_and_not_taken_for_a_batchs_error(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a storage that is gone when the next run is to be taken."""
    from finetune.engine.packed.bank import Bank
    from finetune.files.run_folder import RunFolder
    from finetune.run.run import run_steps
    from sweeps.study.pack import PackedRun, train_together

    works = iter([9, 2, OSError("the storage is gone")])
    real, batches, resources = Bank.forward_backward, [], SharedResources()

    def forward_backward(bank: Bank, requests: Any) -> Any:
        batches.extend((id(request.slot), request.dropout_step) for request in requests)
        bank._run_host_work()  # as where a GPU computes
        return real(bank, requests)

    def take() -> PackedRun | None:
        steps = next(works, None)
        if not isinstance(steps, int):
            if steps is not None:
                raise steps
            return None
        folder = RunFolder(tmp_path / str(steps))
        config = tiny(*SHORT, f"trainer.max_steps={steps}")
        work = run_steps(
            config,
            folder,
            RunContext(
                resources=resources, interactive=False, evaluate_test_rows=False
            ),
        )
        return PackedRun(folder.path.name, work, tmp_path / "log", set())

    monkeypatch.setattr(Bank, "forward_backward", forward_backward)
    with pytest.raises(OSError, match="the storage is gone"):
        train_together(take, 2)
    assert len(batches) > 4
    assert len(set(batches)) == len(batches), "a batch was tried again"
    assert final(tmp_path / "9")["status"] == "interrupted"
    assert final(tmp_path / "2")["status"] == "completed"


def test_nothing_changes_the_default_dtype_while_adapters_are_drawn(
    tiny: Tiny, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch has one for all threads, and transformers sets it to the base's own where a model is
    built."""
    import torch

    base = shutil.copytree(tiny_base, tmp_path / "bfloat16")
    shapes = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**shapes, "dtype": "bfloat16"}))
    sets, takes = torch.set_default_dtype, SharedResources.slot
    seen: list[torch.dtype] = []

    def slot(resources: SharedResources, config: RunConfig) -> Any:
        monkeypatch.setattr(
            torch, "set_default_dtype", lambda dtype: (seen.append(dtype), sets(dtype))
        )
        return takes(resources, config)

    monkeypatch.setattr(SharedResources, "slot", slot)
    configs = [
        tiny(*SHORT, f"model.name_or_path={base}", "lora/target=q_v", f"seed={n}")
        for n in range(2)
    ]
    train_in_slots(configs, tmp_path / "runs", 2)
    assert set(seen) == {torch.float32}


def test_a_result_tells_the_engine_the_slots_and_who_trained_beside(
    tiny: Tiny, tmp_path: Path
) -> None:
    configs = [tiny(*SHORT, f"trainer.max_steps={steps}") for steps in (2, 5, 5, 2)]
    places = train_in_slots(configs, tmp_path, 2)
    told = [
        {key: final(place)[key] for key in ("engine", "slots", "companions")}
        for place in places
    ]
    assert told == [
        {"engine": "packed", "slots": 2, "companions": packed_with}
        for packed_with in (["1"], ["0", "2"], ["1", "3"], ["2"])
    ]
