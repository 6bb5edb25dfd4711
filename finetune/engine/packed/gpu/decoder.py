"""The backend on a GPU: a base's decoder with hand-written kernels.

A run alone is limited by how fast operations can be launched, so there are few of them: norms, the
gate's product and the rotary embedding are one kernel each (`rms_norm`, `gated_product`, `rotary`;
`rotated_norm` is two of them), the adapters of all slots are computed at once (`lowrank`), and
attention stays within each row without padding (`attention`). What the blocks are made of says
`model.decoder_blocks`.

Passes whose kernels are computed faster than they are launched are recorded (`recorded_pass`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from finetune.config.sections.trainer import Checkpointing
from finetune.engine.packed.batch import PackedBatch
from finetune.engine.packed.gpu.adapter_tables import COLUMNS, SlotTable, padded_rank
from finetune.engine.packed.gpu.blocks import BlocksTrace, DecoderBlocks
from finetune.engine.packed.gpu.context import PassContext
from finetune.engine.packed.gpu.context_maker import ContextMaker
from finetune.engine.packed.gpu.cross_entropy import cross_entropy
from finetune.engine.packed.gpu.pass_recorder import PassKind, PassRecorder
from finetune.engine.packed.gpu.pass_size import PassSize, pass_size
from finetune.engine.packed.gpu.recorded_pass import RecordedPass
from finetune.engine.packed.gpu.rms_norm import (
    read_norm,
    rms_norm,
    rms_norm_backward,
)
from finetune.engine.packed.gpu.stored_blocks import StoredBlocks, count_weights
from finetune.engine.packed.pipeline import PassSteps
from finetune.model.architectures import logit_transform_of, text_config_of
from finetune.model.decoder_blocks import decoder_block_of
from finetune.model.layer_devices import block_devices, count_stages

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetune.engine.packed.slot import Slot


@dataclass
class Trace:
    """What a forward pass keeps for its backward pass, which consumes it."""

    prediction_positions: torch.Tensor
    """See `PackedBatch`."""
    blocks: BlocksTrace | RecordedPass
    hidden: torch.Tensor
    """Input of the last norm [answer tokens, hidden_size]."""
    inverse_rms: torch.Tensor
    """Of the last norm [answer tokens]."""
    tokens: int
    """Of the pass, with those that were added."""


class Decoder:
    """Implements `Backend`: embedding, blocks and last norm, without autograd."""

    logits_chunk = 1024
    """With fewer answer tokens at once, their matrix products leave a large GPU half idle."""

    def __init__(
        self,
        base: "PreTrainedModel",
        gradient_checkpointing: Checkpointing,
        borrows_blocks: bool = False,
    ) -> None:
        """Read the base's layers; the base itself is not changed.

        Args:
            base: A base that `supports_gpu_decoder`.
            gradient_checkpointing: As `TrainerSettings` has it, decided.
            borrows_blocks: Whether each GPU of a spread base computes all blocks for its slots
                (`borrowed_blocks`); `reason_not_borrowed` has no objection.
        """
        block = decoder_block_of(base.config)
        assert block is not None
        config = text_config_of(base.config)
        model = base.get_decoder()
        prefix = base.base_model_prefix
        self._embedding = model.embed_tokens
        self._norm = read_norm(model.norm, block)
        # Quantised layers are linear layers too. In the order of the modules, so that layers with
        # the same input have consecutive rows, as `linear_group` needs them.
        linear_names = []
        for name, module in model.named_modules(prefix=prefix):
            if isinstance(module, torch.nn.Linear):
                linear_names.append(name)
        self._table_rows = {name: row for row, name in enumerate(linear_names)}
        """Each linear layer's row in the slots' tables."""
        self.borrows_blocks = borrows_blocks
        self._contexts = ContextMaker(
            model, config, block, [] if borrows_blocks else block_devices(model)
        )
        self._is_spread = count_stages(base) > 1
        element_bytes = self._embedding.weight.element_size()
        logits = self.count_logits_bytes(config, element_bytes)
        self._stored = StoredBlocks(model.layers, gradient_checkpointing, logits)
        self._blocks = DecoderBlocks(
            model,
            prefix,
            self._table_rows,
            config,
            block,
            self._stored,
            borrows_blocks,
        )
        weights = count_weights(model.layers[0])
        self._recorder = PassRecorder(self._blocks, weights, config.hidden_size)

    score = staticmethod(cross_entropy)

    @classmethod
    def count_logits_bytes(cls, shapes: Any, element_bytes: int) -> int:
        """Return the bytes of a chunk of logits, with their gradient.

        Args:
            shapes: The base's text config.
            element_bytes: Bytes of a logit.
        """
        # The gradient takes the logits' place; of capped logits a copy is kept for it.
        copies = 1 if logit_transform_of(shapes).cap is None else 2
        size: int = cls.logits_chunk * shapes.vocab_size * element_bytes * copies
        return size

    def release_memory(self, trains: bool) -> str | None:
        """See `Backend.release_memory`."""
        if trains and self._stored.give_up():
            return "fewer blocks keep their activations from now on"
        if self._recorder.stop():
            return "passes are not recorded any more"
        return None

    def attach(self, slot: "Slot") -> None:
        """Set `slot.kernel_table`."""
        # All zero in the row of a layer without an adapter: rank 0 stands for none.
        rows = [[0] * COLUMNS for _ in self._table_rows]
        for name, adapter in slot.adapters.items():
            rows[self._table_rows[name]] = adapter.table_row()
        slot.kernel_table = SlotTable.of(torch.tensor(rows), slot.vector.device)

    @torch.no_grad()
    def forward(
        self,
        batch: PackedBatch,
        slots: "Sequence[Slot]",
        dropout_steps: Sequence[int] | None,
    ) -> PassSteps[tuple[torch.Tensor, Trace]]:
        """See `Backend.forward`."""
        # Steps are given in training only.
        trains = bool(dropout_steps)
        # What several GPUs compute is not recorded, and the memory of one says little of all.
        if self._is_spread or not self._recorder.is_worthwhile(batch):
            context = self._contexts.make(batch, slots, dropout_steps, None)
            self._begin_pass(trains)
            stores_more = trains and not self._is_spread
            # No name is bound to the embeddings, so that the blocks can free them.
            launched = self._blocks.forward(
                self._embed(context), context, trains, stores_more
            )
            return self._finish(launched, batch.prediction_positions)
        tables = [slot.kernel_table for slot in slots if slot.kernel_table is not None]
        kind = PassKind.of(slots, tables, trains)
        size = pass_size(batch, padded_rank(tables))
        size = self._recorder.choose_size(kind, size)
        context = self._contexts.make(batch, slots, dropout_steps, size)
        self._begin_pass(trains)
        blocks = self._replay_or_launch(self._embed(context), context, kind, size)
        return self._finish(blocks, batch.prediction_positions)

    def _begin_pass(self, trains: bool) -> None:
        if trains:
            self._stored.begin_pass(self._recorder.memory)

    @torch.no_grad()
    def _finish(
        self,
        blocks: PassSteps[tuple[torch.Tensor, BlocksTrace | RecordedPass]],
        prediction_positions: torch.Tensor,
    ) -> PassSteps[tuple[torch.Tensor, Trace]]:
        """Compute the blocks, and then the last norm."""
        x, trace = yield from blocks
        # The last norm and the head see no other positions: only these have a loss.
        positions = prediction_positions.to(x.device)
        hidden = x[positions].to(self._norm.weight.device)
        normalized, inverse_rms, _ = rms_norm(hidden, self._norm)
        return normalized, Trace(
            prediction_positions=positions,
            blocks=trace,
            hidden=hidden,
            inverse_rms=inverse_rms,
            tokens=len(x),
        )

    def _replay_or_launch(
        self, x: torch.Tensor, context: PassContext, kind: PassKind, size: PassSize
    ) -> PassSteps[tuple[torch.Tensor, BlocksTrace | RecordedPass]]:
        """Replay the blocks' forward pass if it is recorded for this size, else launch it."""
        recorded = self._recorder.find(kind, size, x, context)
        if recorded is not None:
            return recorded.forward(x, context), recorded
        before = torch.cuda.memory_allocated()
        output, trace = yield from self._blocks.forward(x, context, kind.trains)
        activations = torch.cuda.memory_allocated() - before
        self._recorder.remember(kind, size, x, context, activations)
        return output, trace

    def _embed(self, context: PassContext) -> torch.Tensor:
        """The embeddings [tokens, hidden_size]. Noise may be added to them (`embedding_noise`)."""
        x: torch.Tensor = self._embedding(context.input_ids[None])[0]
        return x

    @torch.no_grad()
    def backward(self, trace: Trace, gradient: torch.Tensor) -> PassSteps[None]:
        """See `Backend.backward`."""
        # No name is bound to it here, so that the blocks can free it.
        if isinstance(trace.blocks, RecordedPass):
            trace.blocks.backward(self._output_gradient(trace, gradient))
            return
        yield from self._blocks.backward(
            trace.blocks, self._output_gradient(trace, gradient)
        )

    def _output_gradient(self, trace: Trace, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of the blocks' output [tokens, hidden_size]."""
        # Positions that predict no answer token have no gradient of their own, but the blocks
        # below give them one: answers attend to them.
        device = trace.prediction_positions.device
        grad = gradient.new_zeros(trace.tokens, gradient.shape[1], device=device)
        grad_hidden = rms_norm_backward(
            gradient.contiguous().to(trace.hidden.device),
            trace.hidden,
            self._norm,
            trace.inverse_rms,
        )
        # An answer token is predicted at one position only, so nothing has to be summed.
        grad[trace.prediction_positions] = grad_hidden.to(device)
        # Makes room.
        del trace.hidden
        return grad
