"""Memory of the GPU and of the host: how much there is, how much was used, and freeing it."""

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path

import psutil

GIB = 2**30



def out_of_memory(error: BaseException) -> bool:
    """Whether the machine's or the GPU's memory was too small."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and says_out_of_memory(str(error))
    )


def says_out_of_memory(text: str) -> bool:
    """Whether an error's message is of memory."""
    return any(
        words in text for words in ("out of memory", "not enough memory", "can't allocate memory", "MemoryError")
    )


def collect_garbage() -> None:
    """Collect what nothing refers to, and hand the host's memory back to the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # GNU's C library keeps freed memory otherwise
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def free_memory() -> None:
    """Collect what nothing refers to, frozen or not, and hand the host's and the GPU's memory back."""
    import torch

    gc.unfreeze()
    collect_garbage()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def available_memory() -> int:
    """Bytes of memory to compute in: the GPU's, or what this process may take of it, else the machine's."""
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        return int(total * torch.cuda.get_per_process_memory_fraction())
    return int(psutil.virtual_memory().total)


def reset_peak_memory() -> None:
    """Count the peak anew from here: a process may train several runs."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux has it, where the system allows it
        Path("/proc/self/clear_refs").write_text("5")


def resident_memory_bytes() -> int:
    """Return the resident memory of this process on the host, in bytes."""
    return int(psutil.Process().memory_info().rss)


def peak_memory_bytes() -> int:
    """Return the largest memory of this process since `reset_peak_memory`, in bytes: the GPU's, else the host's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _peak_resident_memory()


def _peak_resident_memory() -> int:
    """The peak resident memory on the host since `reset_peak_memory`, in bytes.

    Read from /proc, because neither psutil nor `getrusage` has the peak since a reset: psutil has
    only the current value, and `ru_maxrss` is the peak of the process's whole life. The latter is
    used only where there is no /proc.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
