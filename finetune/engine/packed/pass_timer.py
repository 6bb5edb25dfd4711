"""The duration of a pass, by the CUDA events of `finetune.model.device`."""

import time

import torch

from finetune.model.device import record_event


class PassTimer:
    """Measures a pass: on a GPU by CUDA events, so that host work meanwhile does not count."""

    def __init__(self, device: torch.device) -> None:
        """Start the clock.

        Args:
            device: Computes the pass.
        """
        self._device = device
        self._start_time = time.perf_counter()
        self._start_event = record_event(device)
        self._stop_time = self._start_time
        self._stop_event: torch.cuda.Event | None = None

    def stop(self) -> None:
        """Mark the end of the pass's operations, which the GPU may not have begun yet."""
        self._stop_time = time.perf_counter()
        self._stop_event = record_event(self._device)

    def seconds(self) -> float:
        """Return the duration; on a GPU to be called after the pass's results are fetched."""
        if self._start_event is None or self._stop_event is None:
            return self._stop_time - self._start_time
        # Both events are past: fetching the results has waited for the GPU.
        milliseconds: float = self._start_event.elapsed_time(self._stop_event)
        return milliseconds / 1000
