"""Recorded passes: a pass of many small kernels is launched at once (CUDA graphs).

Where a base is small or tokens are few, a GPU computes faster than Python can launch its kernels.
So the blocks' forward and backward pass are recorded for a size (`pass_size`), and replayed for
each batch that fits into it: its tables are copied to where the recorded kernels read them.
"""

import logging
from collections import OrderedDict
from typing import Any

import torch

from finetune.console import summary_line
from finetune.engine.graph_pool import GraphPool, end_recording
from finetune.engine.packed.batch import PackedBatch
from finetune.engine.packed.gpu.blocks import DecoderBlocks
from finetune.engine.packed.gpu.context import PassContext
from finetune.engine.packed.gpu.pass_size import PassSize
from finetune.engine.packed.pipeline import complete_pass

log = logging.getLogger(__name__)

MAX_PRODUCTS = 5e11
"""Tokens times weights of a block from which a GPU is the limit, not the host. On an H100 a block
of so many takes about 2.5 times as long as its launches."""

MAX_RECORDED = 24
"""Recorded passes at once: the least recently used one makes room."""

SPARE_MEMORY = 512 * 2**20
"""Bytes that are left free beside what a recorded pass takes."""


class PassPool(GraphPool):
    """Where passes are recorded, with the memory of what goes into them and comes out."""

    def __init__(self) -> None:
        """Nothing is in it yet."""
        super().__init__()
        self._buffers: list[torch.Tensor] = []

    def buffers(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for the input of the blocks and for their output, of the shape of x.

        Recorded passes of other sizes have the same memory.
        """
        if not self._buffers or self._buffers[0].numel() < x.numel():
            self._buffers = [torch.empty(x.numel(), dtype=x.dtype, device=x.device)]
            self._buffers.append(torch.empty_like(self._buffers[0]))
        first, second = (buffer[: x.numel()].view(x.shape) for buffer in self._buffers)
        return first, second


class RecordedPass:
    """The blocks' forward and backward pass of one size."""

    def __init__(
        self,
        blocks: DecoderBlocks,
        x: torch.Tensor,
        context: PassContext,
        pool: PassPool,
    ) -> None:
        """Record both; nothing is computed.

        Args:
            blocks: Their kernels have all been launched before, with tensors of these sizes.
            x: As `DecoderBlocks.forward` takes it.
            context: The pass.
            pool: Where it is recorded.
        """
        self._x, self._output = pool.buffers(x)
        # What the kernels read, whichever batch comes; the tables of `context` live as long.
        self._context = context
        traces = []

        def launch_forward() -> None:
            output, trace = complete_pass(blocks.forward(self._x, context, True))
            self._output.copy_(output)
            traces.append(trace)

        def launch_backward() -> None:
            # Whoever wants the output has read it by then.
            complete_pass(blocks.backward(traces.pop(), self._output))

        self._replay_forward = pool.record(launch_forward)
        self._replay_backward = pool.record(launch_backward)

    def forward(self, x: torch.Tensor, context: PassContext) -> torch.Tensor:
        """Compute `DecoderBlocks.forward` of a batch.

        Args:
            x: [tokens, hidden_size].
            context: Of the recorded size.

        Returns:
            The output [tokens, hidden_size], until the backward pass.
        """
        self._x.copy_(x)
        if context is not self._context:
            tables = zip(self._context.tensors(), context.tensors(), strict=True)
            for recorded, tensor in tables:
                recorded.copy_(tensor)
        self._replay_forward()
        return self._output

    def backward(self, gradient: torch.Tensor) -> None:
        """Compute `DecoderBlocks.backward` of the last forward pass."""
        self._output.copy_(gradient)
        self._replay_backward()


class PassRecorder:
    """Records passes of sizes that are met again."""

    def __init__(self, blocks: DecoderBlocks, block_weights: int) -> None:
        """Nothing is recorded yet.

        Args:
            blocks: Compute the passes.
            block_weights: Weights of the linear layers of a block.
        """
        self._blocks = blocks
        self._block_weights = block_weights
        self._is_on = True
        self._met: dict[Any, int] = {}
        """What distinguishes passes that were computed once, and not recorded yet; with the bytes
        that their activations took."""
        self._recorded: OrderedDict[Any, RecordedPass] = OrderedDict()
        self._pool: PassPool | None = None
        self.memory = 0
        """Bytes that recorded passes have for themselves."""

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
        """Return the recorded pass of a size; None: its kernels are to be launched.

        Args:
            size: To which the batch is padded.
            x: The embeddings.
            context: The pass.
        """
        key = _key(size, x, context)
        recorded = self._recorded.get(key)
        if recorded is not None:
            self._recorded.move_to_end(key)
            return recorded
        memory = self._met.get(key)
        if memory is None:
            return None
        if not _is_free(memory):
            self.stop()
            log.info("memory is too small for recorded passes, which would be faster")
            return None
        recorded = self._record(x, context)
        if recorded is None:
            return None
        del self._met[key]
        self._recorded[key] = recorded
        if len(self._recorded) > MAX_RECORDED:
            self._recorded.popitem(last=False)
        return recorded

    def remember(
        self, size: PassSize, x: torch.Tensor, context: PassContext, memory: int
    ) -> None:
        """Note that a pass of a size was launched.

        Args:
            size: As in `find`.
            x: As in `find`.
            context: As in `find`.
            memory: Bytes that the forward pass has left for the backward pass.
        """
        self._met[_key(size, x, context)] = memory

    def _record(self, x: torch.Tensor, context: PassContext) -> RecordedPass | None:
        if self._pool is None:
            self._pool = PassPool()
        before = torch.cuda.memory_reserved()
        try:
            recorded = RecordedPass(self._blocks, x, context, self._pool)
            self.memory += torch.cuda.memory_reserved() - before
            return recorded
        except RuntimeError as error:
            self.stop()
            end_recording()
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
        self._met.clear()
        self._pool = None
        self.memory = 0
        return has_recorded


def _key(size: PassSize, x: torch.Tensor, context: PassContext) -> Any:
    """What distinguishes recorded passes."""
    return (
        size,
        x.dtype,
        context.adapters.constants,
        context.adapted_layers,
        context.query_scales is None,
        # More than one store more blocks.
        context.slots > 1,
    )


def _is_free(memory: int) -> bool:
    """Whether a pass whose activations take so many bytes can be recorded.

    Memory cannot be returned to the GPU while a pass is recorded, so it has to be free before.
    """
    # The backward pass takes more than what the forward pass has left.
    needed = 2 * memory + SPARE_MEMORY
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
    return free >= needed
