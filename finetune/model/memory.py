"""Memory of the GPU and of the host: how much there is, how much was used, and freeing it."""

import contextlib
import ctypes
import gc
import os
import resource
import sys
from pathlib import Path


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
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def reset_peak_memory() -> None:
    """Count the peak anew from here: a process may train several runs."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux has it, where the system allows it
        Path("/proc/self/clear_refs").write_text("5")


def resident_memory_bytes() -> int:
    """What this process has of the host's memory now; 0 where the system does not tell."""
    return _status("VmRSS")


def _status(name: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def peak_memory_bytes() -> int:
    """The most memory that this process had: on the GPU if there is one, else resident in the host's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    found = _status("VmHWM")
    if found:
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
