"""Which passes are recorded, and which recorded pass a batch is computed by.

Recording a pass takes as long as launching its kernels. So a size that is met once is not worth a
recording, and a batch is padded to a larger size that is there already, until the padding has cost
as much as a recording of its own.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from finetune.console import summary_line
from finetune.engine.graph_pool import end_recording
from finetune.engine.packed.batch import PackedBatch
from finetune.engine.packed.gpu.adapter_tables import SlotTable, are_aligned
from finetune.engine.packed.gpu.blocks import DecoderBlocks
from finetune.engine.packed.gpu.context import PassContext
from finetune.engine.packed.gpu.pass_size import PassSize
from finetune.engine.packed.gpu.recorded_pass import PassPool, RecordedPass

if TYPE_CHECKING:
    from finetune.engine.packed.slot import Slot

log = logging.getLogger(__name__)

MAX_PRODUCTS = 5e11
"""Tokens times weights of a block from which a GPU is the limit, not the host. On an H100 a block
of so many takes about 2.5 times as long as its launches."""

RECORDING_PRODUCTS = MAX_PRODUCTS / 20
"""Tokens times weights of a block that a GPU computes while the host records one. On an H200, 30
blocks of 3.5 million weights are recorded in 0.05 to 0.09 s, and computed in 4 to 7 µs a token."""

MAX_RECORDED = 32
"""Recorded passes at once: the least recently used one makes room."""

SPARE_MEMORY = 512 * 2**20
"""Bytes that are left free beside what a recorded pass takes."""


@dataclass(frozen=True)
class PassKind:
    """What distinguishes passes that can't be padded to the same size."""

    trains: bool
    several_slots: bool
    """Of passes that train: more than one store more blocks."""
    adapted_layers: frozenset[str]
    aligned: bool
    """See `SlotTable.aligned`."""
    has_dropout: bool

    @classmethod
    def of(
        cls, slots: "Sequence[Slot]", tables: Sequence[SlotTable], trains: bool
    ) -> "PassKind":
        """Return the kind of a pass.

        Args:
            slots: Those of the pass.
            tables: The slots' tables.
            trains: Whether a backward pass follows.
        """
        return cls(
            trains=trains,
            several_slots=trains and len(slots) > 1,
            adapted_layers=frozenset().union(*(slot.adapters for slot in slots)),
            aligned=are_aligned(tables),
            has_dropout=trains and any(slot.dropout for slot in slots),
        )


class PassRecorder:
    """Records passes of sizes that are met again."""

    def __init__(
        self, blocks: DecoderBlocks, block_weights: int, hidden_size: int
    ) -> None:
        """Nothing is recorded yet.

        Args:
            blocks: Compute the passes.
            block_weights: Weights of the linear layers of a block.
            hidden_size: Columns of a block's input.
        """
        self._blocks = blocks
        self._block_weights = block_weights
        self._hidden_size = hidden_size
        self._is_on = True
        self._met: dict[_Key, int] = {}
        """Passes that were computed once, and not recorded yet, with the bytes that they took."""
        self._recorded: OrderedDict[_Key, RecordedPass] = OrderedDict()
        self._padding_products: Counter[tuple[PassKind, PassSize]] = Counter()
        """What batches of a size have cost because they were padded to a larger one."""
        self._pool: PassPool | None = None
        self._records_evaluations = True
        """Whether memory was large enough for each of them."""
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

    def choose_size(self, kind: PassKind, size: PassSize) -> PassSize:
        """Return the size to which a batch is padded: its own, or one that was met before.

        Args:
            kind: The pass.
            size: The smallest size into which the batch fits.
        """
        chosen = self._smallest(self._recorded, kind, size)
        if chosen is None and self._may_record(kind):
            # Met again, it is recorded.
            chosen = self._smallest(self._met, kind, size)
        chosen = chosen or size
        products = self._padding_products[kind, size]
        products += self._products(chosen) - self._products(size)
        # The added tokens are one row, in which each token attends to those before it.
        products += (chosen.tokens - size.tokens) ** 2 * self._hidden_size
        if products > RECORDING_PRODUCTS:
            return size
        self._padding_products[kind, size] = products
        return chosen

    def _smallest(
        self, keys: "Iterable[_Key]", kind: PassKind, size: PassSize
    ) -> PassSize | None:
        """Return the size among those of passes that a batch is padded to at least cost."""
        # Sizes first, because it takes longer to compare the names of all adapted layers.
        fitting = [
            key.size for key in keys if size.fits_into(key.size) and key.kind == kind
        ]
        return min(fitting, key=self._products, default=None)

    def _products(self, size: PassSize) -> int:
        """The products of a block in a pass of a size, those of its adapters included."""
        # A and B of a layer have as many columns and rows as its input and output together.
        adapters = 2 * size.rank * self._block_weights // self._hidden_size
        return size.tokens * (self._block_weights + adapters)

    def find(
        self, kind: PassKind, size: PassSize, x: torch.Tensor, context: PassContext
    ) -> RecordedPass | None:
        """Return the recorded pass of a size; None: its kernels are to be launched.

        Args:
            kind: The pass.
            size: To which the batch is padded.
            x: The embeddings.
            context: The pass.
        """
        key = _Key.of(kind, size, x, context)
        recorded = self._recorded.get(key)
        if recorded is not None:
            self._recorded.move_to_end(key)
            return recorded
        memory = self._met.get(key)
        if memory is None or not self._may_record(kind):
            return None
        # The backward pass takes more than what the forward pass has left.
        if not _is_free(2 * memory if kind.trains else memory):
            self._give_up(kind)
            return None
        recorded = self._record(key, x, context)
        if recorded is None:
            return None
        del self._met[key]
        self._recorded[key] = recorded
        if len(self._recorded) > MAX_RECORDED:
            self._recorded.popitem(last=False)
        return recorded

    def _may_record(self, kind: PassKind) -> bool:
        """Whether passes of a kind are recorded: evaluations in the memory of passes that train."""
        if kind.trains:
            return True
        return self._records_evaluations and any(
            key.kind.trains for key in self._recorded
        )

    def _give_up(self, kind: PassKind) -> None:
        """Record passes of a kind no more."""
        if not kind.trains:
            self._records_evaluations = False
            return
        self.stop()
        log.info("memory is too small for recorded passes, which would be faster")

    def remember(
        self,
        kind: PassKind,
        size: PassSize,
        x: torch.Tensor,
        context: PassContext,
        activations: int,
    ) -> None:
        """Note that a pass of a size was launched.

        Args:
            kind: As in `find`.
            size: As in `find`.
            x: As in `find`.
            context: As in `find`.
            activations: Bytes that the forward pass has left for the backward pass.
        """
        # In an evaluation, what one block computes is all that it takes.
        outputs = len(x) * self._block_weights // self._hidden_size
        memory = activations + outputs * x.element_size()
        self._met[_Key.of(kind, size, x, context)] = memory

    def _record(
        self, key: "_Key", x: torch.Tensor, context: PassContext
    ) -> RecordedPass | None:
        if self._pool is None:
            self._pool = PassPool()
        before = torch.cuda.memory_reserved()
        try:
            recorded = RecordedPass(
                self._blocks, x, context, key.kind.trains, self._pool
            )
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
        self._padding_products.clear()
        self._pool = None
        self.memory = 0
        return has_recorded


@dataclass(frozen=True)
class _Key:
    """What distinguishes recorded passes."""

    kind: PassKind
    size: PassSize
    dtype: torch.dtype
    scales_queries: bool

    @classmethod
    def of(
        cls, kind: PassKind, size: PassSize, x: torch.Tensor, context: PassContext
    ) -> "_Key":
        return cls(kind, size, x.dtype, context.query_scales is not None)


def _is_free(memory: int) -> bool:
    """Whether so many bytes are free, and some to spare.

    Memory cannot be returned to the GPU while a pass is recorded, so it has to be free before.
    """
    needed = memory + SPARE_MEMORY
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
    return free >= needed
