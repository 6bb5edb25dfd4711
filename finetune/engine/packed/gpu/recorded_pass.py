"""Recorded passes: a pass of many small kernels is launched at once (CUDA graphs).

Where a base is small or tokens are few, a GPU computes faster than Python can launch its kernels.
So the blocks' forward and backward pass are recorded for a size (`pass_size`), and replayed for
each batch that fits into it: its tables are copied to where the recorded kernels read them.
"""

import torch

from finetune.engine.graph_pool import GraphPool
from finetune.engine.packed.gpu.blocks import DecoderBlocks
from finetune.engine.packed.gpu.context import PassContext
from finetune.engine.packed.pipeline import complete_pass


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
            # An evaluation may be the first that needs it, and training writes to it too.
            with torch.inference_mode(False):
                self._buffers = [torch.empty(x.numel(), dtype=x.dtype, device=x.device)]
                self._buffers.append(torch.empty_like(self._buffers[0]))
        first, second = (buffer[: x.numel()].view(x.shape) for buffer in self._buffers)
        return first, second


class RecordedPass:
    """The blocks' forward pass of one size and, where a slot trains, their backward pass."""

    def __init__(
        self,
        blocks: DecoderBlocks,
        x: torch.Tensor,
        context: PassContext,
        trains: bool,
        pool: PassPool,
    ) -> None:
        """Record them; nothing is computed.

        Args:
            blocks: Their kernels have all been launched before, with tensors of these sizes.
            x: As `DecoderBlocks.forward` takes it.
            context: The pass.
            trains: Whether a backward pass follows.
            pool: Where it is recorded.
        """
        self._x, self._output = pool.buffers(x)
        # What the kernels read, whichever batch comes; the tables of `context` live as long.
        self._context = context
        traces = []

        def launch_forward() -> None:
            output, trace = complete_pass(blocks.forward(self._x, context, trains))
            self._output.copy_(output)
            if trains:
                traces.append(trace)

        def launch_backward() -> None:
            # Whoever wants the output has read it by then.
            complete_pass(blocks.backward(traces.pop(), self._output))

        self._replay_forward = pool.record(launch_forward)
        if trains:
            self._replay_backward = pool.record(launch_backward)

    def forward(self, x: torch.Tensor, context: PassContext) -> torch.Tensor:
        """Compute `DecoderBlocks.forward` of a batch.

        Args:
            x: [tokens, hidden_size].
            context: Of the recorded size.

        Returns:
            The output [tokens, hidden_size], until the backward pass or another forward pass.
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
