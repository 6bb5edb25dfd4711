"""The base's own modules, hooked, with autograd: what computes the slots' adapters wherever the kernels do not.

Each adapted linear layer adds to every slot's stretch of the line what that slot's adapter makes of it. With no pass
going on, the base works as if there were no hooks.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from finetune.engine.packed.batch import ATTENTION, PackedBatch
from finetune.engine.packed.fused_layers import fuse_layers
from finetune.engine.packed.lora_linear import SlotTokens, lora_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetune.engine.packed.slot import Slot


@dataclass(frozen=True)
class _Pass:
    """A pass that goes on: whose tokens are where."""

    parts: list[tuple["Slot", int, int]]
    """A slot and its tokens: from, to."""
    draws: Sequence[int] | None
    """One for each part; None: no dropout."""


@dataclass(frozen=True)
class _Trace:
    """What a forward pass keeps for its backward pass."""

    now: _Pass
    hidden: torch.Tensor
    """With what autograd knows of it."""


class AutogradBackend:
    """A base with hooks."""

    logits_chunk = 512
    """Answers' tokens whose logits are in memory at once."""

    def __init__(self, base: "PreTrainedModel", saves: bool) -> None:
        self._base, self._saves = base, saves
        self._pass: _Pass | None = None
        self._anchor = torch.zeros((), device=base.get_input_embeddings().weight.device, requires_grad=True)
        """Makes outputs part of the graph."""
        self._hooks: set[str] = set()
        fuse_layers(base, lambda: self._pass is not None)

    def hook(self, names: set[str]) -> None:
        """Let linear layers of the base add what the slots' adapters make of their input, while a pass goes on."""
        for name in names - self._hooks:
            self._hook(name, self._base.get_submodule(name))
        self._hooks |= names

    def forward(
        self, line: PackedBatch, slots: "Sequence[Slot]", draws: Sequence[int] | None
    ) -> tuple[torch.Tensor, _Trace]:
        """The last hidden state where an answer's token is predicted [answers' tokens, width].

        `draws` name each slot's dropout masks; without them nothing is dropped.
        """
        now = _Pass([(slot, *part) for slot, part in zip(slots, line.parts, strict=True)], draws)
        with self._passing(now):
            states = self._base.get_decoder()(
                input_ids=line.ids, position_ids=line.positions, use_cache=False, line=line
            )
        hidden = states.last_hidden_state[0, line.predictors]
        return hidden.detach(), _Trace(now, hidden)

    def backward(self, trace: _Trace, gradient: torch.Tensor) -> None:
        """Put the adapters' gradients into the slots, from that of the hidden state."""
        for slot, _, _ in trace.now.parts:
            slot.gradient.zero_()
        with self._passing(trace.now):
            torch.autograd.backward(trace.hidden, gradient)

    @staticmethod
    def score(
        logits: torch.Tensor, targets: torch.Tensor, learns: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Negative log-likelihoods of the targets, float32 [rows], and whether each is the likeliest token.

        Where it learns, that is not told, but the losses' gradient of the logits [rows, tokens].
        """
        logits, places = logits.float(), targets[:, None]
        logs = torch.log_softmax(logits, -1)
        losses = -logs.gather(-1, places)[:, 0]
        if not learns:
            return losses, logits.argmax(-1) == targets, None
        del logits
        slope = logs.exp_()
        slope.scatter_add_(-1, places, slope.new_full((1, 1), -1).expand_as(places))
        return losses, torch.ones_like(targets, dtype=torch.bool), slope

    @contextlib.contextmanager
    def generation_model(self, slot: "Slot") -> Iterator["PreTrainedModel"]:
        """The base as one slot's adapter makes it, for whatever is asked of it meanwhile."""
        self._pass = _Pass([(slot, 0, -1)], None)
        try:
            yield self._base
        finally:
            self._pass = None

    @contextlib.contextmanager
    def _passing(self, now: _Pass) -> Iterator[None]:
        base, config = self._base, self._base.config
        attention, training, saves = config._attn_implementation, base.training, self._saves and now.draws is not None
        try:
            self._pass = now
            config._attn_implementation = ATTENTION
            if saves:  # transformers does it in training mode alone
                enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
                enable({"use_reentrant": False})
            base.train(now.draws is not None)
            yield
        finally:
            config._attn_implementation = attention
            if saves:
                getattr(base, "activation_checkpointing_disable", base.gradient_checkpointing_disable)()
            base.train(training)
            self._pass = None

    def _hook(self, name: str, layer: torch.nn.Module) -> None:
        plain: Callable[[torch.Tensor], torch.Tensor] = layer.forward
        mixes_rows = type(layer).__name__ == "Linear8bitLt"  # its outlier columns are a batch's, not a row's

        def forward(x: torch.Tensor) -> torch.Tensor:
            now = self._pass
            if now is None:
                return plain(x)
            stretches = []
            for index, (slot, start, stop) in enumerate(now.parts):
                adapter = slot.adapters.get(name)
                if adapter is not None:
                    draw = now.draws[index] if now.draws is not None else None
                    end = x[..., 0].numel() if stop < 0 else stop
                    stretches.append(SlotTokens(slot.seed, slot.dropout, adapter, start, end, draw))
            if not mixes_rows:
                return lora_linear(x, self._anchor, None, layer, stretches)
            alone = [plain(x[:, start:stop] if stop >= 0 else x) for _, start, stop in now.parts]
            return lora_linear(x, self._anchor, torch.cat(alone, 1), layer, stretches)

        layer.forward = forward
