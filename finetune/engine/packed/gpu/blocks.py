"""The blocks of a GPU's decoder, one after another, forward and backward.

With gradient checkpointing (Chen et al., 2016) a block keeps only its input and is computed again
for its backward pass, except for its last product, which no gradient needs. The last blocks keep
all activations, as many as memory allows (`stored_blocks`).

Only operations on the GPU, none of which the host waits for: they can be recorded
(`recorded_pass`).
"""

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from finetune.engine.packed.gpu.block import Block, BlockActivations
from finetune.engine.packed.gpu.borrowed_blocks import (
    BlockSource,
    BorrowedBlocks,
    PlainBlocks,
    Replica,
)
from finetune.engine.packed.gpu.context import PassContext
from finetune.engine.packed.gpu.per_layer_input import (
    PerLayerEmbedding,
    ProjectionActivations,
)
from finetune.engine.packed.gpu.stored_blocks import StoredBlocks, allocated_memory
from finetune.engine.packed.pipeline import PassSteps
from finetune.model.decoder_blocks import DecoderBlock, has_per_layer_inputs
from finetune.model.layer_devices import block_devices


@dataclass
class BlocksTrace:
    """What the blocks' forward pass keeps for their backward pass, which consumes it."""

    context: PassContext
    blocks: list[BlockActivations | torch.Tensor]
    """The activations of each block, or its input to recompute them from."""
    per_layer: ProjectionActivations | None
    """Of what computes per-layer inputs; None: no adapter stands there."""


class DecoderBlocks:
    """All blocks of a decoder, on the base's own weights or on borrowed ones."""

    def __init__(
        self,
        model: Any,
        prefix: str,
        table_rows: dict[str, int],
        config: Any,
        block: DecoderBlock,
        stored: StoredBlocks,
        borrows: bool = False,
    ) -> None:
        """Read the blocks.

        Args:
            model: Transformers' decoder.
            prefix: Its name in the base.
            table_rows: Each linear layer's row in the slots' tables, by full name.
            config: The base's text config.
            block: What the blocks are made of.
            stored: Says how many blocks keep their activations.
            borrows: Whether each device computes all blocks, of passes that begin there.
        """
        self._stored = stored
        self._position_kinds = block.position_kinds
        self._rotary = model.rotary_emb
        self._rotary_elsewhere = {
            device: copy.deepcopy(model.rotary_emb).to(device)
            for device in set(block_devices(model)) - {model.embed_tokens.weight.device}
        }
        """On other GPUs, as a copy of its results would wait for what both have to compute."""
        self._per_layer: PerLayerEmbedding | None = None
        if has_per_layer_inputs(config, block):
            self._per_layer = PerLayerEmbedding(model, prefix, table_rows, block)
        layer_types: list[str | None] = [None] * len(model.layers)
        if block.rotary_by_layer_type:
            layer_types = list(config.layer_types)
        self._layer_types = sorted(set(layer_types), key=str)

        def read(number: int, module: Any) -> Block:
            name = f"{prefix}.layers.{number}"
            return Block(module, name, table_rows, config, block, layer_types[number])

        blocks = [read(number, module) for number, module in enumerate(model.layers)]
        devices = block_devices(model)
        self._layers = len(blocks)
        self._plain = PlainBlocks(blocks, devices)
        self._borrowed: dict[torch.device, BorrowedBlocks] = {}
        """By the device that computes a pass; empty: none is borrowed."""
        for device in dict.fromkeys(devices) if borrows else ():
            replicas = {
                number: Replica.of(module, device)
                for number, module in enumerate(model.layers)
                if devices[number] != device
            }
            computed = [*blocks]
            for number, replica in replicas.items():
                computed[number] = read(number, replica.module)
            self._borrowed[device] = BorrowedBlocks(device, computed, replicas)

    def forward(
        self,
        x: torch.Tensor,
        context: PassContext,
        trains: bool,
        stores_more: bool = False,
    ) -> PassSteps[tuple[torch.Tensor, BlocksTrace]]:
        """Compute all blocks, each in a step.

        Args:
            x: The embeddings [tokens, hidden_size].
            context: The pass, without what is computed here.
            trains: Whether a backward pass follows.
            stores_more: Whether as many blocks keep their activations as memory allows, instead of
                the fewest.

        Returns:
            The last block's output [tokens, hidden_size], and the trace for `backward`.
        """
        blocks = self._blocks_of(context)
        x = x.to(context.position_ids.device)
        context = self._with_angles(context, x)
        per_layer = None
        if self._per_layer is not None:
            inputs, per_layer = self._per_layer.forward(x, context)
            context = dataclasses.replace(context, per_layer_inputs=inputs)
        layers = self._layers
        recomputed = layers - self._stored.count_fewest(context.slots)
        allocated = allocated_memory(x.device) if stores_more else None
        stored: list[BlockActivations | torch.Tensor] = []
        for number in range(layers):
            device = blocks.device(number)
            yield device
            x = x.to(device)
            with blocks.use(number, 1) as block:
                output, activations = block.forward(x, context.on(device))
            assert output is not None
            if number == 0 and allocated is not None:
                most = self._stored.count_most(context.slots, x, allocated)
                recomputed = layers - most
            x = output
            if trains and number < recomputed:
                stored.append(activations.block_input)
            elif trains:
                stored.append(activations)
            # Or they would outlive the next block's forward pass.
            del activations, output
        return x, BlocksTrace(context, stored, per_layer)

    def _blocks_of(self, context: PassContext) -> BlockSource:
        """The blocks that a pass goes through."""
        return self._borrowed.get(context.position_ids.device, self._plain)

    def _with_angles(self, context: PassContext, x: torch.Tensor) -> PassContext:
        """Add the angles of the rotary embedding to a pass, on each device.

        Args:
            context: The pass.
            x: The embeddings.
        """
        elsewhere = {}
        for device, other in context.elsewhere.items():
            elsewhere[device] = self._with_angles(other, x.new_empty(1, device=device))
        angles = {kind: self._angles(x, context, kind) for kind in self._layer_types}
        return dataclasses.replace(
            context, angles=angles, shared_heads={}, elsewhere=elsewhere
        )

    def _angles(
        self, x: torch.Tensor, context: PassContext, layer_type: str | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the rotary embedding [tokens, rotary_dim] of a type of layer."""
        positions = context.position_ids[None]
        if self._position_kinds > 1:
            positions = positions.expand(self._position_kinds, -1, -1)
        rotary = self._rotary_elsewhere.get(x.device, self._rotary)
        # Transformers' module reads no more of x than its dtype and device.
        if layer_type is None:
            cos, sin = rotary(x[None], positions)
        else:
            cos, sin = rotary(x[None], positions, layer_type)
        # Contiguous, because the kernels compute addresses from the sizes alone.
        return cos[0].contiguous(), sin[0].contiguous()

    def backward(self, trace: BlocksTrace, grad: torch.Tensor) -> PassSteps[None]:
        """Compute the gradients of the adapters, which go into the slots, each block in a step.

        Args:
            trace: From `forward`.
            grad: Gradient of its output [tokens, hidden_size]; overwritten.
        """
        # As in `count_fewest`: several slots need room for as many batches anyway.
        cache_weights = trace.context.slots > 1
        blocks = self._blocks_of(trace.context)
        for number in reversed(range(self._layers)):
            # Taken out of the trace, so that the activations are freed block by block.
            stored = trace.blocks.pop()
            device = blocks.device(number)
            yield device
            grad = grad.to(device)
            weight_cache: dict[str, torch.Tensor] | None = None
            if cache_weights:
                weight_cache = {}
            context = dataclasses.replace(
                trace.context.on(device), weight_cache=weight_cache
            )
            with blocks.use(number, -1) as block:
                if isinstance(stored, torch.Tensor):
                    _, stored = block.forward(stored, context, recompute=True)
                grad_x = block.backward(
                    grad,
                    stored,
                    context,
                    need_input_grad=number > 0,
                )
            if grad_x is not None:
                grad = grad_x
        if self._per_layer is not None and trace.per_layer is not None:
            gradients = trace.context.per_layer_inputs
            assert gradients is not None
            self._per_layer.backward(gradients, trace.per_layer, trace.context)
