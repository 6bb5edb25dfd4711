"""The memory of tensors on the CPU."""

from collections.abc import Callable


def allocated(compute: Callable[[], object]) -> int:
    """Return the peak of the tensors that a call allocates, in bytes."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        compute()
    memory = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            memory += event.nbytes()
            peak = max(peak, memory)
    return peak
