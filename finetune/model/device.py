"""The device that a run computes on: choosing a GPU, CUDA events, copies to and from it."""

import contextlib
import os
from collections.abc import Iterator, Sequence

import torch

from finetune.errors import refusal

if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
    # Each step has another number of tokens. Segments that can grow avoid the fragmentation that
    # this causes, and the repeated release and allocation of memory.
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def on_gpu() -> bool:
    """Return whether there is a GPU to train on."""
    return torch.cuda.is_available()


def is_ampere_or_later(device: torch.device) -> bool:
    """Return whether a device is an NVIDIA GPU of compute capability 8.0 (Ampere) or later.

    The packed engine's Triton kernels are written for these.
    """
    # PyTorch calls AMD's GPUs `cuda` too; their version numbers mean something else.
    is_amd = torch.version.hip is not None
    if device.type != "cuda" or not on_gpu() or is_amd:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@contextlib.contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Leave attention to PyTorch's other kernels while tokens are generated.

    cuDNN plans its attention anew for each number of keys, which takes 40 ms a token.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def visible_gpus() -> list[str]:
    """Return the GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    # A scheduler may have made some GPUs visible only, by number or by UUID.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(count)]
    # Of a list with an unknown name, CUDA sees what stands before it.
    return [name.strip() for name in names[:count]]


def gpu_group_count(size: int) -> int:
    """Return how many processes with `size` GPUs each have GPUs of their own; 1 on a CPU."""
    return max(1, torch.cuda.device_count() // size)


def spread_gpus(setting: int | str) -> int:
    """Return over how many GPUs this process spreads a base; 1 on a CPU.

    Args:
        setting: `trainer.gpus`.

    Raises:
        ConfigError: So many are not visible here.
    """
    if setting in ("auto", 1):
        return 1
    gpus = int(setting)
    count = torch.cuda.device_count() if on_gpu() else 0
    if gpus > count:
        visible = "1 GPU is" if count == 1 else f"{count} GPUs are"
        raise refusal("trainer.gpus", gpus, f"{visible} visible here")
    return gpus


def select_gpus(number: int, size: int = 1, gpus: Sequence[str] | None = None) -> None:
    """Make some GPUs visible to this process: the Trainer would spread a run over all visible ones.

    Call it before any GPU is used, and before bitsandbytes is imported. Only the first call in a
    process counts: the runs of a worker keep the worker's GPUs.

    Args:
        number: the process's number; groups of GPUs are assigned in turn.
        size: how many GPUs the process gets.
        gpus: the GPUs to choose from, as CUDA_VISIBLE_DEVICES names them; None: those that the
            process sees. A scheduler may have left just `size` of them.
    """
    global _has_selected
    if _has_selected:
        return
    _has_selected = True
    names = visible_gpus() if gpus is None else list(gpus)
    if gpus is None and len(names) <= size:
        return
    first = number % max(1, len(names) // size) * size
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[first : first + size])


_has_selected = False
"""Whether this process has its GPUs."""


def record_event(device: torch.device) -> "torch.cuda.Event | None":
    """Record a CUDA event on a device's current stream; two events give the time between them.

    Returns:
        The event; None on a CPU.
    """
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    # Not of the current device: the slots of a base may be on several.
    event.record(torch.cuda.current_stream(device))
    return event


@contextlib.contextmanager
def copy_stream_after(event: "torch.cuda.Event | None") -> Iterator[None]:
    """Make the block's copies wait for work up to an event only, not for later work on the GPU.

    Args:
        event: From `record_event`; None on a CPU, where nothing runs asynchronously.
    """
    if event is None:
        yield
        return
    stream = torch.cuda.Stream(event.device)  # type: ignore[no-untyped-call]
    stream.wait_event(event)
    with torch.cuda.stream(stream):
        yield


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copy a tensor from the host to a device, on a GPU without waiting for its pending work.

    An asynchronous copy needs pinned memory.
    """
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    # PyTorch keeps the pinned memory until the copy is complete.
    return tensor.pin_memory().to(device, non_blocking=True)


MOST_PINNED = 256 * 2**20
"""Most bytes that are copied to pinned memory at once. PyTorch keeps that memory for later."""


class HostCopy:
    """A tensor of a GPU in host memory; work that the GPU is given later does not delay it.

    Of a tensor in host memory it is the tensor itself.
    """

    def __init__(self, tensor: torch.Tensor, total_bytes: int | None = None) -> None:
        """Queue the copy behind the work that computes the tensor.

        Args:
            tensor: What is copied.
            total_bytes: Of all tensors that are copied at once; None: of this one.
        """
        # Into pinned memory, which PyTorch allocates for it. For larger copies the host waits here.
        is_pinned = (total_bytes or tensor.nbytes) <= MOST_PINNED
        self._copy = tensor.to("cpu", non_blocking=is_pinned)
        self._event = record_event(tensor.device)

    def read(self) -> torch.Tensor:
        """Return the copy; waits until it is complete."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy
