"""Recording what is launched on a GPU, to launch it all with one launch (CUDA graphs)."""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch

from finetune.compat import end_failed_recording, pause_collections


@functools.cache
def _recording_stream(gpu: int) -> torch.cuda.Stream:
    """The stream that is recorded on, one of a process for each GPU.

    Matrix products keep their workspaces (`WORKSPACES` in `run.decoder_memory`) for each stream
    that they were ever launched on, until the process ends: streams of each bank would add up.
    """
    return torch.cuda.Stream(gpu)  # type: ignore[no-untyped-call]


class GraphPool:
    """The stream and the memory that recordings share: one of them is under way at a time.

    After a recording that failed, it is used no more.
    """

    def __init__(self) -> None:
        """Nothing is in it yet."""
        self._stream = _recording_stream(torch.cuda.current_device())
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Record what a function launches, instead of computing it.

        Returns:
            Computes it.
        """
        graph = torch.cuda.CUDAGraph()
        # Not `torch.cuda.graph`, which gives all unused memory back first.
        self._stream.wait_stream(torch.cuda.current_stream())
        stream = torch.cuda.stream(self._stream)
        with stream, pause_collections(), self._capturing(graph):
            launch()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph.replay

    @contextlib.contextmanager
    def _capturing(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        # Other threads may use the GPU meanwhile: they save adapters.
        graph.capture_begin(self._pool, capture_error_mode="thread_local")
        try:
            yield
        except BaseException:
            # Its own error would hide the first one.
            with contextlib.suppress(RuntimeError):
                graph.capture_end()
            end_failed_recording(torch.cuda.current_device(), self._pool)
            raise
        graph.capture_end()


def end_recording() -> None:
    """Record something after a recording that failed.

    Until a recording succeeds, PyTorch's generator of random numbers assumes that one is under way,
    and refuses to draw.
    """
    number = torch.zeros(1, device="cuda")
    GraphPool().record(number.zero_)  # type: ignore[arg-type]
