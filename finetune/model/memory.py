"""Memory of the GPU and of the host: its size, its use, and how to free it.

Loads torch only inside functions: `finetune.run.run` imports this module at its top.
"""

import atexit
import contextlib
import functools
import gc
import io
import resource
import sys
from pathlib import Path

import psutil

from finetune.model.heap import trim_heap
from finetune.model.host_memory import free_host_memory

GIB = 2**30
"""Bytes of a gibibyte."""

USABLE = 0.9
"""Fraction of the memory that a run plans with."""

_WRITERS = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)
"""Files that have a buffer."""


@functools.cache
def freeze_libraries() -> None:
    """Keep the garbage collector from visiting what is imported by now, for the process's life.

    A collection would take half a second, at the end of each run, and twice that at the end of the
    process. To be called before a base is loaded, because what is frozen and in a cycle is never
    freed.
    """
    gc.collect()
    gc.freeze()
    atexit.register(_freeze_at_exit)


def _freeze_at_exit() -> None:
    """Flush open files, and keep Python's last collections from visiting anything."""
    gc.unfreeze()
    # Those that are in cycles would be closed by these collections.
    for each in gc.get_objects():
        if issubclass(type(each), _WRITERS):
            with contextlib.suppress(Exception):
                each.flush()
    gc.freeze()


def unfreeze_libraries() -> None:
    """Undo `freeze_libraries`, which has frozen the objects of the user's program as well."""
    gc.unfreeze()
    freeze_libraries.cache_clear()


def free_memory() -> None:
    """Collect unreachable objects; return host and GPU memory to the system."""
    import torch

    gc.collect()
    trim_heap()
    # PyTorch keeps freed GPU memory for itself. What is to be released must be unreachable by now.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def total_memory(gpu: int = 0) -> int:
    """Return the bytes of a GPU that this process may have, or of the host without a GPU.

    The share of a GPU is what `set_per_process_memory_fraction` has set.

    Args:
        gpu: Its number.
    """
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(gpu).total_memory
        return int(total * torch.cuda.get_per_process_memory_fraction(gpu))
    return int(psutil.virtual_memory().total)


def available_memory(gpus: int = 1) -> int:
    """Return the bytes that a run may compute in: of the GPU if there is one, else of the host.

    What this process has already counts, what other processes have does not.

    Args:
        gpus: How many GPUs the base is spread over; the one that has least counts.
    """
    import torch

    if torch.cuda.is_available():
        return min(_available_on(gpu) for gpu in range(gpus))
    return free_host_memory()


def _available_on(gpu: int) -> int:
    import torch

    free, _ = torch.cuda.mem_get_info(gpu)
    return int(min(total_memory(gpu), free + torch.cuda.memory_reserved(gpu)))


def allocatable_memory() -> int:
    """Return the bytes that this process can allocate now, of the GPU if there is one.

    What PyTorch has reserved and not allocated counts. Of several GPUs that have something of this
    process the fullest counts.
    """
    import torch

    if torch.cuda.is_available():
        # Asking for the memory of another GPU would begin to use it.
        used = [
            n for n in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(n)
        ]
        return min(
            _available_on(gpu) - torch.cuda.memory_allocated(gpu) for gpu in used or [0]
        )
    return free_host_memory() - resident_memory_bytes()


def reset_peak_memory() -> None:
    """Measure the peak from here on: a process may train several runs."""
    import torch

    if torch.cuda.is_available():
        # Its allocator knows the GPUs only then.
        torch.cuda.init()  # type: ignore[no-untyped-call]
        for number in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(number)
    # On Linux, if the system allows it: 5 resets the peak of the resident memory (`VmHWM`).
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident_memory_bytes() -> int:
    """Return the resident memory of this process on the host, in bytes."""
    return int(psutil.Process().memory_info().rss)


def peak_memory_bytes() -> int:
    """Return the peak memory of this process since `reset_peak_memory`, in bytes.

    On a GPU it is the memory that PyTorch has allocated there, of several that of the fullest; else
    the host's resident memory.
    """
    import torch

    if torch.cuda.is_available():
        numbers = range(torch.cuda.device_count())
        return max(torch.cuda.max_memory_allocated(number) for number in numbers)
    return _peak_resident_memory()


def _peak_resident_memory() -> int:
    """Return the peak resident memory on the host, in bytes.

    It is read from /proc, because neither psutil nor `getrusage` reports the peak since a reset:
    psutil has only the current value, and `ru_maxrss` is the peak of the process's whole life. The
    latter is used only where there is no /proc.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                # In KiB.
                return int(line.split()[1]) * 1024
    # macOS reports bytes, Linux KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
