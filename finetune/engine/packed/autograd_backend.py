"""The backend on the base's own modules with autograd: used wherever the GPU kernels are not.

The adapted linear layers are hooked: during a pass each one adds the contribution of every slot's
adapter to that slot's tokens. Recurrent layers compute each row by itself (`row_by_row`). Outside a
pass the base works as if there were no hooks.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from finetune.engine.packed.attention import PackedAttention, use_packed_attention
from finetune.engine.packed.autograd_pass import Pass, SlotSpan
from finetune.engine.packed.batch import PackedBatch
from finetune.engine.packed.dora import dora_linear
from finetune.engine.packed.fused_layers import fuse_layers
from finetune.engine.packed.lora_linear import SlotTokens, lora_linear
from finetune.engine.packed.pipeline import PassSteps
from finetune.engine.packed.row_adapters import RowAdapters
from finetune.engine.packed.row_by_row import call_row_by_row, recurrent_layers
from finetune.model.heap import trimmed_heap
from finetune.model.routed_experts import use_routed_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetune.engine.packed.slot import Slot


@dataclass(frozen=True)
class _Trace:
    """What a forward pass keeps for its backward pass."""

    current_pass: Pass
    hidden: torch.Tensor
    """The hidden states with their autograd graph."""


class AutogradBackend:
    """Implements `Backend` with hooks on the base's linear layers."""

    logits_chunk = 512
    borrows_blocks = False

    def __init__(self, base: "PreTrainedModel", gradient_checkpointing: bool) -> None:
        """Prepare a base for passes.

        Args:
            base: Its norms and feed-forward layers are fused in place, and its experts are computed
                by `finetune.model.experts`.
            gradient_checkpointing: Recompute activations in the backward pass.
        """
        self._base = base
        self._gradient_checkpointing = gradient_checkpointing
        self._pass: Pass | None = None
        self._row_adapters: RowAdapters | None = None
        """Those of the slots for which text is generated now."""
        device = base.get_input_embeddings().weight.device
        # Makes the outputs part of the graph where no input requires a gradient.
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self._hooked: set[str] = set()
        """Names of the layers with a hook."""
        fuse_layers(base, self._is_active)
        use_routed_experts(base)
        for layer in recurrent_layers(base.get_decoder()):
            self._compute_row_by_row(layer)

    def _is_active(self) -> bool:
        """Whether the base works for slots now."""
        return self._pass is not None or self._row_adapters is not None

    def attach(self, slot: "Slot") -> None:
        """Hook the layers that the slot adapts, unless another slot has done so."""
        for name in slot.adapters.keys() - self._hooked:
            self._hook(name, self._base.get_submodule(name))
            self._hooked.add(name)

    def forward(
        self,
        batch: PackedBatch,
        slots: "Sequence[Slot]",
        dropout_steps: Sequence[int] | None,
    ) -> PassSteps[tuple[torch.Tensor, _Trace]]:
        """See `Backend.forward`. All is computed by the call itself."""
        return self._computed(self._forward(batch, slots, dropout_steps))

    def _computed(
        self, result: tuple[torch.Tensor, _Trace]
    ) -> PassSteps[tuple[torch.Tensor, _Trace]]:
        yield result[0].device
        return result

    def _forward(
        self,
        batch: PackedBatch,
        slots: "Sequence[Slot]",
        dropout_steps: Sequence[int] | None,
    ) -> tuple[torch.Tensor, _Trace]:
        spans = []
        numbers: Sequence[int | None] = dropout_steps or [None] * len(slots)
        slot_spans = zip(
            slots,
            batch.batch_spans,
            numbers,
            strict=True,
        )
        for slot, (start, stop), step in slot_spans:
            span = SlotSpan(
                slot=slot,
                start=start,
                stop=stop,
                dropout_step=step,
            )
            spans.append(span)
        current_pass = Pass(
            spans,
            training=dropout_steps is not None,
            attention=PackedAttention(batch),
            rows=[(span.start, span.stop) for span in batch.spans],
        )
        decoder = self._base.get_decoder()
        with self._during(current_pass), trimmed_heap(decoder):
            states = decoder(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
            )
        # No other positions have a loss, so the head computes no logits for them.
        last_states = states.last_hidden_state[0]
        hidden = last_states[batch.prediction_positions.to(last_states.device)]
        # Detached: head and loss are computed without autograd, `backward` gets their gradient.
        return hidden.detach(), _Trace(current_pass, hidden)

    def backward(self, trace: _Trace, gradient: torch.Tensor) -> PassSteps[None]:
        """See `Backend.backward`. It is one step."""
        yield gradient.device
        for span in trace.current_pass.spans:
            # `lora_linear` adds to it.
            span.slot.zero_gradient()
        # Gradient checkpointing computes the blocks again within this call, with the same hooks.
        decoder = self._base.get_decoder()
        with self._during(trace.current_pass), trimmed_heap(decoder):
            hidden = trace.hidden
            torch.autograd.backward(hidden, gradient.to(hidden.device))

    def release_memory(self, trains: bool) -> None:
        """See `Backend.release_memory`: there is none."""

    @staticmethod
    def score(
        logits: torch.Tensor, targets: torch.Tensor, with_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """See `Backend.score`."""
        # In 16 bits the sum over the vocabulary would be rounded too much.
        logits = logits.float()
        if with_gradient:
            # Not used then: finding the likeliest token would read the logits once more.
            correct = torch.ones_like(targets, dtype=torch.bool)
        else:
            correct = logits.argmax(-1) == targets
        target_columns = targets[:, None]
        # All in the place of the logits, which are by far the largest tensors: to get new memory
        # from the system takes longer than to compute what is written to it.
        log_probabilities = torch.log_softmax(logits, -1, out=logits)
        losses = -log_probabilities.gather(-1, target_columns)[:, 0]
        if not with_gradient:
            return losses, correct, None
        # The gradient is the probabilities, minus 1 at the target.
        gradient = log_probabilities.exp_()
        minus_one = gradient.new_full((1, 1), -1)
        gradient.scatter_add_(-1, target_columns, minus_one.expand(len(targets), 1))
        return losses, correct, gradient

    @contextlib.contextmanager
    def adapted_rows(self, slots: "Sequence[Slot]") -> Iterator["PreTrainedModel"]:
        """Apply slots' adapters to the rows that the base computes, without dropout.

        Args:
            slots: Attached slots. The base is called with equally many rows of each, one slot's
                after another's.

        Yields:
            The base.
        """
        self._row_adapters = RowAdapters(slots)
        try:
            yield self._base
        finally:
            self._row_adapters = None

    @contextlib.contextmanager
    def _during(self, current_pass: Pass) -> Iterator[None]:
        """Put the base into the state of a pass, and back afterwards."""
        checkpointing = self._gradient_checkpointing and current_pass.training
        was_training = self._base.training
        with contextlib.ExitStack() as stack:
            # Registered before anything is changed, so that an error in between undoes it too.
            stack.callback(self._finish_pass, was_training)
            self._pass = current_pass
            config = self._base.get_decoder().config
            stack.enter_context(use_packed_attention(config, current_pass.attention))
            if checkpointing:
                stack.enter_context(_gradient_checkpointing(self._base))
            # Transformers checkpoints in training mode only.
            self._base.train(current_pass.training)
            yield

    def _finish_pass(self, was_training: bool) -> None:
        self._base.train(was_training)
        self._pass = None

    def _compute_row_by_row(self, layer: torch.nn.Module) -> None:
        """Let a layer compute each row of a pass by itself."""
        original: Callable[..., Any] = layer.forward

        def forward(*arguments: Any, **named_arguments: Any) -> Any:
            current_pass = self._pass
            if current_pass is None:
                return original(*arguments, **named_arguments)

            def compute_row(number: int, *row_arguments: Any, **named: Any) -> Any:
                self._pass = current_pass.of_row(number)
                return original(*row_arguments, **named)

            try:
                return call_row_by_row(
                    compute_row, current_pass.rows, arguments, named_arguments
                )
            finally:
                self._pass = current_pass

        layer.forward = forward

    def _hook(self, name: str, layer: torch.nn.Module) -> None:
        _require_linear(layer)
        original: Callable[[torch.Tensor], torch.Tensor] = layer.forward
        # LLM.int8() chooses outlier columns by all rows of a batch, so a slot's numbers would
        # depend on other slots: each slot's tokens go through the layer separately.
        separate = type(layer).__name__ == "Linear8bitLt"

        def forward(x: torch.Tensor) -> torch.Tensor:
            if self._row_adapters is not None:
                base_layer = original if separate else None
                return self._row_adapters.forward(name, layer, x, base_layer)
            if self._pass is None:
                return original(x)
            slot_tokens = _adapted_tokens(self._pass, name)
            if any(tokens.adapter.magnitude is not None for tokens in slot_tokens):
                return dora_linear(x, self._anchor, layer, slot_tokens)
            output = None
            if separate:
                spans = self._pass.spans
                slot_inputs = [x[:, span.start : span.stop] for span in spans]
                output = torch.cat([original(slot_x) for slot_x in slot_inputs], 1)
            return lora_linear(x, self._anchor, output, layer, slot_tokens)

        layer.forward = forward


def _require_linear(layer: torch.nn.Module) -> None:
    """Refuse layers that keep their weight otherwise (GPT-2's are transposed)."""
    if not isinstance(layer, torch.nn.Linear):
        raise NotImplementedError(f"adapters on layers of {type(layer).__name__}")


def _adapted_tokens(current_pass: Pass, name: str) -> list[SlotTokens]:
    """The tokens of the slots that adapt a layer."""
    slot_tokens = []
    for span in current_pass.spans:
        adapter = span.slot.adapters.get(name)
        if adapter is None:
            continue
        tokens = SlotTokens(
            seed=span.slot.seed,
            dropout=span.slot.dropout,
            adapter=adapter,
            start=span.start,
            stop=span.stop,
            dropout_step=span.dropout_step,
            row=span.row,
        )
        slot_tokens.append(tokens)
    return slot_tokens


@contextlib.contextmanager
def _gradient_checkpointing(base: "PreTrainedModel") -> Iterator[None]:
    """Recompute the activations of each block in the backward pass (Chen et al., 2016)."""
    # Transformers renames the methods gradient_checkpointing_* to activation_checkpointing_*.
    enable = getattr(
        base, "activation_checkpointing_enable", base.gradient_checkpointing_enable
    )
    disable = getattr(
        base, "activation_checkpointing_disable", base.gradient_checkpointing_disable
    )
    # Reentrant checkpointing would give no gradients: no input of a block requires one.
    enable({"use_reentrant": False})
    try:
        yield
    finally:
        disable()
