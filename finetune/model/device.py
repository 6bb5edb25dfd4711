"""The device that a run computes on: choosing a GPU, CUDA events, copies to it."""

import contextlib
import os
from collections.abc import Iterator

import torch

if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
    # Every step has another number of tokens: memory that can grow is not cut up by them, given back and taken anew.
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def on_gpu() -> bool:
    """Whether there is a GPU to train on."""
    return torch.cuda.is_available()


def newer_gpu(device: torch.device) -> bool:
    """Whether it is a GPU for which today's kernels are written: Ampere or later."""
    if device.type != "cuda" or not on_gpu() or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def take_device(number: int) -> None:
    """Leave one GPU visible to this process, before any is used: Trainer would spread a run over all of them."""
    count = torch.cuda.device_count()
    if count > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(index) for index in range(count)]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[number % len(names)]


def record_event(device: torch.device) -> "torch.cuda.Event | None":
    """A mark behind all that a GPU has been told to do until now; two of them say how long it takes. None on a CPU."""
    if device.type != "cuda":
        return None
    mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    mark.record()
    return mark


@contextlib.contextmanager
def copy_stream_after(mark: "torch.cuda.Event | None") -> Iterator[None]:
    """What is copied from the GPU here waits for what it was told before the mark, not for what came after."""
    if mark is None:
        yield
        return
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_event(mark)
    with torch.cuda.stream(aside):
        yield


def to_device(part: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A tensor on its way to the device: a GPU takes it from pinned memory, and nobody waits for what it still does."""
    return part.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else part.to(device)
