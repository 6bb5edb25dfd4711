"""Which GPUs a process sees: their number is what PyTorch counts, which is made up here."""

import os

import pytest
import torch

from finetune.model import device
from finetune.model.device import gpu_group_count, select_gpus, visible_gpus


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine without GPUs, in a process that has chosen none."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(device, "_has_selected", False)
    return monkeypatch


def with_gpus(
    machine: pytest.MonkeyPatch, count: int, visible: str | None = None
) -> None:
    machine.setattr(torch.cuda, "device_count", lambda: count)
    machine.setattr(device, "_has_selected", False)
    if visible is None:
        machine.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        machine.setenv("CUDA_VISIBLE_DEVICES", visible)


@pytest.mark.parametrize(
    ("count", "visible", "size", "selected"),
    [
        (4, None, 1, ["0", "1", "2", "3", "0"]),
        (4, None, 2, ["0,1", "2,3", "0,1", "2,3", "0,1"]),
        (4, "4,5,6,7", 2, ["4,5", "6,7", "4,5", "6,7", "4,5"]),
        (2, "GPU-a, GPU-b", 1, ["GPU-a", "GPU-b", "GPU-a", "GPU-b", "GPU-a"]),
        # The third GPU is in no group.
        (3, None, 2, ["0,1"] * 5),
        # CUDA has stopped at the unknown name.
        (1, "3,x,5", 1, ["3,x,5"] * 5),
        # A scheduler has given the worker its GPUs.
        (2, "6,7", 2, ["6,7"] * 5),
        (1, "6", 1, ["6"] * 5),
        (0, "", 1, [""] * 5),
    ],
)
def test_each_worker_sees_gpus_of_its_own(
    machine: pytest.MonkeyPatch,
    count: int,
    visible: str | None,
    size: int,
    selected: list[str],
) -> None:
    for number, expected in enumerate(selected):
        with_gpus(machine, count, visible)
        select_gpus(number, size)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


def test_without_gpus_nothing_is_selected(machine: pytest.MonkeyPatch) -> None:
    with_gpus(machine, 0)
    select_gpus(1, 2)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_the_runs_of_a_worker_keep_its_gpus(machine: pytest.MonkeyPatch) -> None:
    with_gpus(machine, 4)
    select_gpus(1, 2)
    machine.setattr(torch.cuda, "device_count", lambda: 2)
    select_gpus(0)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_gpus_that_a_process_does_not_see_are_chosen_by_their_names(
    machine: pytest.MonkeyPatch,
) -> None:
    """submitit's local jobs see none."""
    with_gpus(machine, 0, "")
    select_gpus(1, 1, ["4", "5"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
    with_gpus(machine, 0, "")
    select_gpus(1, 1, [])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_gpus_are_counted_in_groups(machine: pytest.MonkeyPatch) -> None:
    with_gpus(machine, 5, "a,b,c,d,e,f")
    assert visible_gpus() == ["a", "b", "c", "d", "e"]
    assert [gpu_group_count(size) for size in (1, 2, 5, 8)] == [5, 2, 1, 1]
