"""Copies from other GPUs to one that go on while it computes. On a CPU they are plain copies."""

import contextlib
from collections.abc import Iterator, Sequence

import torch

from finetune.model.device import record_event

Copy = tuple[torch.Tensor, torch.Tensor]
"""Where to, and what."""


class DeviceCopies:
    """Copies to one device, on streams of their own."""

    def __init__(self, device: torch.device) -> None:
        """Nothing is copied yet.

        Args:
            device: To which tensors are copied.
        """
        self._device = device
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def start(
        self, copies: Sequence[Copy], after: "torch.cuda.Event | None"
    ) -> "torch.cuda.Event | None":
        """Begin to copy tensors that nobody changes any more.

        Args:
            copies: All from one device.
            after: From `mark`: the copies wait for it; None: they wait for nothing.

        Returns:
            An event after the last copy, for `wait`; None on a CPU.
        """
        source = copies[0][1].device
        with self._copying(source, after):
            for target, value in copies:
                target.copy_(value, non_blocking=True)
            return record_event(self._device)

    def wait(self, event: "torch.cuda.Event | None") -> None:
        """Let what the device is given from now on wait for copies."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)

    def mark(self) -> "torch.cuda.Event | None":
        """Return an event after all that the device has been given by now; None on a CPU."""
        return record_event(self._device)

    @contextlib.contextmanager
    def _copying(
        self, source: torch.device, after: "torch.cuda.Event | None"
    ) -> Iterator[None]:
        """Make the streams of copies the current ones of both devices.

        PyTorch copies on the current stream of the source, and lets that of the target wait.
        """
        if self._device.type != "cuda":
            yield
            return
        target_stream = self._stream_on(self._device)
        if after is not None:
            target_stream.wait_event(after)
        with (
            torch.cuda.stream(self._stream_on(source)),
            torch.cuda.stream(target_stream),
        ):
            yield

    def _stream_on(self, device: torch.device) -> "torch.cuda.Stream":
        """The stream for copies on a device; those to other targets have others there."""
        if device not in self._streams:
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            # Until the tensors are there.
            stream.wait_stream(torch.cuda.current_stream(device))
            self._streams[device] = stream
        return self._streams[device]
