"""Recorded passes: a pass of many small kernels is launched at once (CUDA graphs).

Where a base is small or tokens are few, a GPU computes faster than Python can launch its kernels.
So the blocks' forward and backward pass are recorded for a size (`pass_size`), and replayed for
each batch that fits into it: its tables are copied to where the recorded kernels read them.
"""

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from finetune.console import summary_line
from finetune.engine.packed.batch import PackedBatch
from finetune.engine.packed.gpu.context import PassContext
from finetune.engine.packed.gpu.pass_size import PassSize

log = logging.getLogger(__name__)

MAX_PRODUCTS = 5e11
"""Tokens times weights of a block from which a GPU is the limit, not the host. On an H100 a block
of so many takes about 2.5 times as long as its launches."""

MAX_RECORDED = 24
"""Recorded passes at once: the least recently used one makes room."""


class Blocks(Protocol):
    """The blocks of a decoder, which launches their kernels."""

    def forward_blocks(
        self, x: torch.Tensor, context: PassContext, trains: bool
    ) -> tuple[torch.Tensor, Any]:
        """Compute the last block's output [tokens, hidden_size], and a trace."""

    def backward_blocks(self, trace: Any, grad: torch.Tensor) -> None:
        """Compute the gradients of the slots' adapters from that of the output."""


class RecordingPlace:
    """The stream and the memory that recorded passes share: one is under way at a time."""

    def __init__(self) -> None:
        """Take a stream."""
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def recording(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """Record what the context launches instead of computing it."""
        # Not `torch.cuda.graph`, which gives all unused memory back first.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # Other threads may use the GPU meanwhile: they save adapters.
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                yield
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)


class RecordedPass:
    """The blocks' forward and backward pass of one size."""

    def __init__(
        self,
        decoder: Blocks,
        x: torch.Tensor,
        context: PassContext,
        place: "RecordingPlace",
    ) -> None:
        """Record both; nothing is computed.

        Args:
            decoder: Whose kernels have all been launched before, with tensors of these sizes.
            x: As `forward_blocks` takes it.
            context: The pass.
            place: Where it is recorded.
        """
        self._x = x.clone()
        # What the kernels read, whichever batch comes; the tables of `context` live as long.
        self._context = context
        self._gradient = torch.empty_like(x)
        self._forward = torch.cuda.CUDAGraph()
        self._backward = torch.cuda.CUDAGraph()
        with place.recording(self._forward):
            self._output, trace = decoder.forward_blocks(self._x, context, True)
        with place.recording(self._backward):
            decoder.backward_blocks(trace, self._gradient)

    def forward(self, x: torch.Tensor, context: PassContext) -> torch.Tensor:
        """Compute `Blocks.forward_blocks` of a batch.

        Args:
            x: [tokens, hidden_size].
            context: Of the recorded size.

        Returns:
            The output [tokens, hidden_size], until the next forward pass.
        """
        self._x.copy_(x)
        if context is not self._context:
            for recorded, tensor in zip(
                self._context.tensors(), context.tensors(), strict=True
            ):
                recorded.copy_(tensor)
        self._forward.replay()
        return self._output

    def backward(self, gradient: torch.Tensor) -> None:
        """Compute `Blocks.backward_blocks` of the last forward pass."""
        self._gradient.copy_(gradient)
        self._backward.replay()


class PassRecorder:
    """Records passes of sizes that are met again."""

    def __init__(self, decoder: Blocks, block_weights: int) -> None:
        """Nothing is recorded yet.

        Args:
            decoder: Computes the passes.
            block_weights: Weights of the linear layers of a block.
        """
        self._decoder = decoder
        self._block_weights = block_weights
        self._is_on = True
        self._met: set[Any] = set()
        """What distinguishes passes that were computed once, and not recorded yet."""
        self._recorded: OrderedDict[Any, RecordedPass] = OrderedDict()
        self._place: RecordingPlace | None = None

    def is_worthwhile(self, batch: PackedBatch) -> bool:
        """Whether launching a batch's kernels may take longer than computing them."""
        tokens = batch.input_ids.shape[1]
        return (
            self._is_on
            and batch.input_ids.is_cuda
            and tokens * self._block_weights < MAX_PRODUCTS
        )

    def find(
        self, size: PassSize, x: torch.Tensor, context: PassContext
    ) -> RecordedPass | None:
        """Return the recorded pass of a size; None: it is met for the first time.

        Args:
            size: To which the batch is padded.
            x: The embeddings.
            context: The pass.
        """
        key = (
            size,
            x.dtype,
            context.adapters.constants,
            context.adapted_layers,
            context.query_scales is None,
            # More than one store more blocks.
            context.slots > 1,
        )
        recorded = self._recorded.get(key)
        if recorded is not None:
            self._recorded.move_to_end(key)
            return recorded
        if key not in self._met:
            self._met.add(key)
            return None
        recorded = self._record(x, context)
        if recorded is None:
            return None
        self._recorded[key] = recorded
        if len(self._recorded) > MAX_RECORDED:
            self._recorded.popitem(last=False)
        return recorded

    def _record(self, x: torch.Tensor, context: PassContext) -> RecordedPass | None:
        if self._place is None:
            self._place = RecordingPlace()
        try:
            return RecordedPass(self._decoder, x, context, self._place)
        except RuntimeError as error:
            self.stop()
            _end_recording()
            log.warning(
                "passes cannot be recorded; each kernel is launched by itself (%s)",
                summary_line(error),
            )
            return None

    def stop(self) -> bool:
        """Let go of what is recorded, with its memory, and record nothing more.

        Returns:
            Whether anything was recorded.
        """
        has_recorded = bool(self._recorded)
        self._is_on = False
        self._recorded.clear()
        self._place = None
        return has_recorded


def _end_recording() -> None:
    """Record something after a recording that failed.

    Until a recording succeeds, PyTorch's generator of random numbers takes it that one is under
    way, and refuses to draw.
    """
    with RecordingPlace().recording(torch.cuda.CUDAGraph()):
        torch.empty(1, device="cuda").zero_()
