"""The bank: the adapters of all slots on one frozen base, which train and are measured together.

The tokens of all slots go through the base as one line (`finetune.layout`); each linear layer adds to every
slot's own stretch of it what that slot's adapter makes of it. So a slot's numbers are those it would have alone,
to the rounding of a matrix product.
"""

import contextlib
import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from finetune.base import add_adapter, compute_dtype, free_memory, out_of_memory
from finetune.config import LoraSettings, RunConfig
from finetune.evaluation import Evaluation
from finetune.layout import ATTENTION, Line, Row
from finetune.lean import make_lean

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

LOGITS = 512
"""Answers' tokens whose logits are in memory at once."""


@dataclass(frozen=True)
class Adapter:
    """One layer's adapter in one slot: what it adds is `scaling · B A x`. All are views of the slot's vectors."""

    number: int
    """Among the slot's adapters; its dropout masks are drawn by it."""
    scaling: float
    a: torch.Tensor
    """[rank, in], in the dtype of matrix products"""
    b: torch.Tensor
    """[out, rank]"""
    gradient_a: torch.Tensor
    """float32, as are the weights that the optimizer moves"""
    gradient_b: torch.Tensor


class Slot:
    """A place on the bank where one run trains: its adapter, flat, in float32."""

    def __init__(self, bank: "Bank", lora: LoraSettings, seed: int) -> None:
        from peft.tuners.lora import LoraLayer

        self.bank, self.dropout, self.seed = bank, lora.dropout, seed
        self.model: PeftModel = add_adapter(bank.skeleton(), lora, seed)
        """The adapter as PEFT has it, on a base without weights: to save it, load it and count it."""
        layers = {
            name: module
            for name, module in self.model.base_model.model.named_modules()
            if isinstance(module, LoraLayer)
        }
        weights = {name: (layer.lora_A["default"], layer.lora_B["default"]) for name, layer in layers.items()}
        length = sum(part.weight.numel() for pair in weights.values() for part in pair)
        self.vector = torch.empty(length, device=bank.device)
        """All weights [parameters]: what the optimizer moves."""
        self.gradient = torch.zeros_like(self.vector)
        """Of the last batch."""
        self._rounded = torch.empty_like(self.vector, dtype=bank.dtype) if bank.dtype != torch.float32 else self.vector
        self.adapters: dict[str, Adapter] = {}
        offset = 0
        for number, (name, pair) in enumerate(weights.items()):
            views = []
            for part in pair:
                place = slice(offset, offset + part.weight.numel())
                own, rounded, gradient = (
                    flat[place].view(part.weight.shape) for flat in (self.vector, self._rounded, self.gradient)
                )
                own.copy_(part.weight.data)
                part.weight.data = own
                views.append((rounded, gradient))
                offset = place.stop
            (a, gradient_a), (b, gradient_b) = views
            scaling = float(layers[name].scaling["default"])
            self.adapters[name] = Adapter(number, scaling, a, b, gradient_a, gradient_b)

    def round(self) -> None:
        """Take over what has become of the weights, where matrix products have another dtype."""
        if self._rounded is not self.vector:
            self._rounded.copy_(self.vector)


@dataclass(frozen=True)
class Learning:
    """A run's wish: the gradient of a batch's loss, the sum over its answers' tokens times `share`."""

    slot: Slot
    rows: Sequence[Row]
    share: float
    """1 / the number of the optimizer step's answer tokens; times the loss scale, where there is one."""
    draw: int
    """Counts the run's batches: names the batch's dropout masks."""

    @property
    def bank(self) -> "Bank":
        """What computes it."""
        return self.slot.bank


@dataclass(frozen=True)
class Learnt:
    """What came of a batch; its gradient is in the slot."""

    loss: float
    """Sum of its answers' tokens' negative log-likelihoods, in nats."""
    seconds: float
    """That the batch took, all slots' together."""


@dataclass(frozen=True)
class Measuring:
    """A run's wish: what its adapter makes of some rows."""

    slot: Slot
    rows: Sequence[Row]

    @property
    def bank(self) -> "Bank":
        """What computes it."""
        return self.slot.bank


Wish = Learning | Measuring
Granted = Learnt | Evaluation


@dataclass
class _Pass:
    """A forward pass that goes on: whose tokens are where."""

    parts: list[tuple[Slot, int, int]]
    """A slot and its tokens: from, to."""
    draws: list[int] = field(default_factory=list)
    """One for each part, or empty: no dropout."""


class Bank:
    """A frozen base and the slots on it. With no pass going on, the base works as if there were no bank."""

    def __init__(self, base: "PreTrainedModel", config: RunConfig) -> None:
        self.base, self.dtype = base.requires_grad_(False), compute_dtype(config.quantization)
        self._checkpointing = config.trainer.gradient_checkpointing is True
        self.device = base.get_input_embeddings().weight.device
        self._head = base.get_output_embeddings()
        self._pass: _Pass | None = None
        self._anchor = torch.zeros((), device=self.device, requires_grad=True)  # makes outputs part of the graph
        self._routed: set[str] = set()
        make_lean(base, lambda: self._pass is not None)
        self.taken = 0
        """Slots in which runs train."""
        self.capacity: int | None = None
        """How many wishes can be granted at once, if memory was once too small for more."""

    def slot(self, lora: LoraSettings, seed: int) -> Slot:
        """A fresh adapter, the one that PEFT would draw from the seed."""
        slot = Slot(self, lora, seed)
        for name in slot.adapters.keys() - self._routed:
            self._route(name, self.base.get_submodule(name))
        self._routed |= slot.adapters.keys()
        return slot

    def skeleton(self) -> "PreTrainedModel":
        """A model of the base's shapes, with next to no memory, for PEFT to put an adapter on."""
        with torch.device("meta"):
            skeleton: PreTrainedModel = type(self.base)(copy.deepcopy(self.base.config))
        for module in skeleton.modules():
            if isinstance(module, torch.nn.Linear):
                shape = module.weight.shape
                module.weight = torch.nn.Parameter(torch.zeros(1, 1).expand(shape), requires_grad=False)
        return skeleton

    def grant(self, wishes: Sequence[Wish]) -> list[Granted | Exception]:
        """Grant wishes of several slots, as many at once as memory allows.

        What fails for several is done again in halves, so that an error stands only for the wish that it is of.
        """
        found: dict[int, Granted | Exception] = {}
        for kind in (Learning, Measuring):
            own = [wish for wish in wishes if isinstance(wish, kind)]
            size = self.capacity or len(own)
            for start in range(0, len(own), max(size, 1)):
                part = own[start : start + size]
                found |= zip(map(id, part), self._grant_some(part), strict=True)
        return [found[id(wish)] for wish in wishes]

    def _grant_some(self, wishes: Sequence[Any]) -> "Sequence[Granted | Exception]":
        try:
            return self.learn(wishes) if isinstance(wishes[0], Learning) else self.measure(wishes)
        except Exception as error:
            if len(wishes) == 1:
                return [error]
            size = len(wishes) // 2
            if out_of_memory(error):
                self.capacity = size
                log.warning("memory is too small for %d slots at once: %d from here on", len(wishes), size)
        free_memory()  # no exception is held any more, nor what its frames hold
        parts = (wishes[start : start + size] for start in range(0, len(wishes), size))
        return [granted for part in parts for granted in self._grant_some(part)]

    def learn(self, wishes: Sequence[Learning]) -> list[Learnt]:
        """One forward and backward of all wishes' batches together; gradients replace those in the slots."""
        began = time.perf_counter()
        line = Line([wish.rows for wish in wishes], self.device)
        for wish in wishes:
            wish.slot.gradient.zero_()
        shares = torch.cat(
            [
                torch.full((stop - start,), wish.share, device=self.device)
                for wish, (start, stop) in zip(wishes, line.answers, strict=True)
            ]
        )
        with self._passing(line, wishes, [wish.draw for wish in wishes]):
            hidden = self._hidden(line)
            answers = self._answers(hidden.detach(), line, shares)
            torch.autograd.backward(hidden, answers.gradient)
        losses = [float(answers.losses[start:stop].double().sum()) for start, stop in line.answers]
        seconds = time.perf_counter() - began
        return [Learnt(loss, seconds) for loss in losses]

    def measure(self, wishes: Sequence[Measuring]) -> list[Evaluation]:
        """What each wish's adapter makes of its rows."""
        line = Line([wish.rows for wish in wishes], self.device)
        with torch.inference_mode(), self._passing(line, wishes, []):
            answers = self._answers(self._hidden(line), line, None)
        assert answers.right is not None
        count = sum(len(wish.rows) for wish in wishes)
        sums = torch.zeros(count, dtype=torch.float64, device=self.device)
        losses = sums.index_add(0, line.owners, answers.losses.double()).tolist()
        tokens = torch.bincount(line.owners, minlength=count).tolist()
        found, first = [], 0
        for wish, (start, stop) in zip(wishes, line.answers, strict=True):
            own = slice(first, first + len(wish.rows))
            right = int(answers.right[start:stop].sum())
            found.append(Evaluation(tuple(losses[own]), tuple(tokens[own]), right / max(stop - start, 1)))
            first = own.stop
        return found

    @contextlib.contextmanager
    def speaking(self, slot: Slot) -> Iterator["PreTrainedModel"]:
        """The base as one slot's adapter makes it, for whatever is asked of it meanwhile."""
        slot.round()
        self._pass = _Pass([(slot, 0, -1)])
        try:
            yield self.base
        finally:
            self._pass = None

    @contextlib.contextmanager
    def _passing(self, line: Line, wishes: Sequence[Wish], draws: list[int]) -> Iterator[None]:
        parts = [(wish.slot, start, stop) for wish, (start, stop) in zip(wishes, line.parts, strict=True)]
        for wish in wishes:
            wish.slot.round()
        config, training = self.base.config, self.base.training
        attention = config._attn_implementation
        self._pass = _Pass(parts, draws)
        config._attn_implementation = ATTENTION
        if draws and self._checkpointing:  # transformers does it in training mode alone
            self.base.gradient_checkpointing_enable({"use_reentrant": False})
        self.base.train(bool(draws))
        try:
            yield
        finally:
            config._attn_implementation = attention
            if draws and self._checkpointing:
                self.base.gradient_checkpointing_disable()
            self.base.train(training)
            self._pass = None

    def _hidden(self, line: Line) -> torch.Tensor:
        """The last hidden state [answers' tokens, width] where an answer's token is predicted."""
        decoder = self.base.get_decoder()
        states = decoder(input_ids=line.ids, position_ids=line.positions, use_cache=False, line=line)
        hidden: torch.Tensor = states.last_hidden_state[0, line.predictors]
        return hidden

    def _answers(self, hidden: torch.Tensor, line: Line, shares: torch.Tensor | None) -> "_Answers":
        """Losses of the answers' tokens; by shares of them their gradient, without shares what was right.

        Some logits at a time: they are by far the largest tensors, so each is gone over as seldom as can be.
        """
        weight = dense_weight(self._head)
        losses, right, gradients = [], [], []
        for start in range(0, len(hidden), LOGITS):
            part = slice(start, start + LOGITS)
            targets = line.targets[part, None]
            logits = linear(hidden[part], weight).float()
            logs = torch.log_softmax(logits, -1)
            losses.append(-logs.gather(-1, targets)[:, 0])
            if shares is None:
                right.append(logits.argmax(-1) == targets[:, 0])
                continue
            del logits
            slope = logs.exp_()
            slope.scatter_add_(-1, targets, slope.new_full((1, 1), -1).expand_as(targets))
            into_hidden = slope.to(hidden.dtype) @ weight
            gradients.append((into_hidden * shares[part, None]).to(hidden.dtype))
        joined = [torch.cat(parts) if parts else None for parts in (right, gradients)]
        return _Answers(torch.cat(losses), *joined)

    def _route(self, name: str, layer: torch.nn.Module) -> None:
        """Let a linear layer of the base add what the slots' adapters make of its input, while a pass goes on."""
        plain: Callable[[torch.Tensor], torch.Tensor] = layer.forward
        mixes_rows = type(layer).__name__ == "Linear8bitLt"  # its outlier columns are a batch's, not a row's

        def forward(x: torch.Tensor) -> torch.Tensor:
            if self._pass is None:
                return plain(x)
            stretches = []
            for index, (slot, start, stop) in enumerate(self._pass.parts):
                adapter = slot.adapters.get(name)
                if adapter is not None:
                    draw = self._pass.draws[index] if self._pass.draws else None
                    stretches.append(_Stretch(slot, adapter, start, x[..., 0].numel() if stop < 0 else stop, draw))
            if not mixes_rows:
                return adapted(x, self._anchor, None, layer, stretches)
            alone = [plain(x[:, start:stop] if stop >= 0 else x) for _, start, stop in self._pass.parts]
            return adapted(x, self._anchor, torch.cat(alone, 1), layer, stretches)

        layer.forward = forward


@dataclass(frozen=True)
class _Answers:
    losses: torch.Tensor
    """[answers' tokens] negative log-likelihoods, float32"""
    right: torch.Tensor | None
    """[answers' tokens] whether the model would have chosen the token"""
    gradient: torch.Tensor | None
    """[answers' tokens, width]"""


@dataclass(frozen=True)
class _Stretch:
    """A slot's tokens in a layer's input, and its adapter there."""

    slot: Slot
    adapter: Adapter
    start: int
    stop: int
    draw: int | None

    def dropped(self, x: torch.Tensor) -> torch.Tensor | None:
        """Which of the input's elements are dropped [tokens, in]; None: none.

        Drawn from the run's seed, the batch and the layer alone, so it is the same alone and packed, resumed, and
        when activations are recomputed.
        """
        slot = self.slot
        if self.draw is None or not slot.dropout:
            return None
        generator = torch.Generator(x.device)
        generator.manual_seed(((slot.seed * 1_000_003 + self.draw) * 4_093 + self.adapter.number) % 2**63)
        # Four elements of 16 bits from each number drawn: drawing is what dropout costs on a CPU.
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
        words.random_(-(2**63), None, generator=generator)
        drawn = words.view(torch.int16)[: x.numel()].view(x.shape)
        return drawn < round(slot.dropout * 65536) - 32768

    @property
    def scaling(self) -> float:
        """Of what the adapter adds; kept elements stand for the dropped ones as well."""
        kept = 1.0 if self.draw is None else 1 - self.slot.dropout
        return self.adapter.scaling / kept


class _Adapted(torch.autograd.Function):
    """A frozen linear layer and the adapters of the slots, each on its own stretch of tokens.

    Adapters' gradients are added to the slots'; autograd sees the input alone. Where the layer's own output is
    given, autograd has its part already.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        anchor: torch.Tensor,
        output: torch.Tensor | None,
        layer: torch.nn.Module,
        stretches: list[_Stretch],
    ) -> torch.Tensor:
        ctx.layer, ctx.stretches, ctx.computes = layer, stretches, output is None
        y = linear(x, dense_weight(layer), getattr(layer, "bias", None)) if output is None else output.clone()
        flat_x, flat_y = x.flatten(0, -2), y.flatten(0, -2)
        kept: list[torch.Tensor | None] = []
        for stretch in stretches:
            tokens = slice(stretch.start, stretch.stop)
            own = flat_x[tokens]
            dropped = stretch.dropped(own)
            h = _without(own, dropped) @ stretch.adapter.a.t()
            flat_y[tokens].addmm_(h, stretch.adapter.b.t(), alpha=stretch.scaling)
            kept += [h, dropped]
        ctx.save_for_backward(x, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        x, *kept = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0]
        into_x = None
        if wanted:
            into_x = gradient @ dense_weight(ctx.layer) if ctx.computes else torch.zeros_like(x)
        flat_x, flat_y = x.flatten(0, -2), gradient.flatten(0, -2)
        for stretch, h, dropped in zip(ctx.stretches, kept[::2], kept[1::2], strict=True):
            tokens, adapter = slice(stretch.start, stretch.stop), stretch.adapter
            own, slope = flat_x[tokens], flat_y[tokens]
            into_h = (slope @ adapter.b) * stretch.scaling
            _add(adapter.gradient_b, slope.t(), h, stretch.scaling)
            _add(adapter.gradient_a, into_h.t(), _without(own, dropped), 1.0)
            if into_x is not None:
                part = into_x.flatten(0, -2)[tokens]
                if dropped is None:
                    part.addmm_(into_h, adapter.a)
                else:
                    part.add_(_without(into_h @ adapter.a, dropped))
        return into_x, None, None if ctx.computes else gradient, None, None


adapted: Callable[..., torch.Tensor] = _Adapted.apply


def _without(x: torch.Tensor, dropped: torch.Tensor | None) -> torch.Tensor:
    return x if dropped is None else x.masked_fill(dropped, 0.0)


def _add(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    """Add a product to a float32 gradient."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        total.add_(left @ right, alpha=scale)


def dense_weight(layer: torch.nn.Module) -> torch.Tensor:
    """A linear layer's weight [out, in] as it is multiplied by: what 4 bits hold, dequantised."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    dense: torch.Tensor = dequantize_4bit(weight.data, state)
    return dense
