"""The bank: the adapters of all slots on one frozen base, which train and are measured together.

The tokens of all slots go through the base as one line (`finetune.layout`); each linear layer adds to every
slot's own stretch of it what that slot's adapter makes of it. So a slot's numbers are those it would have alone,
to the rounding of a matrix product. On a GPU that is computed by hand (`finetune.gpu.decoder`), else by the base's own
modules (`finetune.hooked`).
"""

import contextlib
import copy
import functools
import logging
import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn.functional import linear

from finetune.adapted import Adapter, dense_weight
from finetune.base import add_adapter, compute_dtype, free_memory, newer_gpu, out_of_memory, told, waiting_only_for
from finetune.cli import brief
from finetune.config import LoraSettings, QuantizationSettings, RunConfig
from finetune.evaluation import Evaluation
from finetune.hooked import Hooked
from finetune.layout import Line, Row, sent

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel

    from finetune.gpu.decoder import Decoder

log = logging.getLogger(__name__)


class Slot:
    """A place on the bank where one run trains: its adapter, flat, in float32.

    `model` is the adapter as PEFT has it, on a base without weights: to save it, load it and count it.
    """

    def __init__(self, bank: "Bank", lora: LoraSettings, seed: int, model: "PeftModel") -> None:
        from peft.tuners.lora import LoraLayer

        self.bank, self.dropout, self.seed, self.model = bank, lora.dropout, seed, model
        layers = {
            name: module
            for name, module in self.model.base_model.model.named_modules()
            if isinstance(module, LoraLayer)
        }
        weights = {name: (layer.lora_A["default"], layer.lora_B["default"]) for name, layer in layers.items()}
        drawn = torch.cat([part.weight.data.flatten() for pair in weights.values() for part in pair])
        self.vector = sent(drawn, bank.device)
        """All weights [parameters]: what the optimizer moves."""
        self.gradient = torch.zeros_like(self.vector)
        """Of the last batch."""
        self._rounded = torch.empty_like(self.vector, dtype=bank.dtype) if bank.dtype != torch.float32 else self.vector
        self.adapters: dict[str, Adapter] = {}
        self._parts: list[tuple[torch.nn.Parameter, slice]] = []
        """The model's weights, and where in the vector they are."""
        offset = 0
        for number, (name, pair) in enumerate(weights.items()):
            views = []
            for part in pair:
                place = slice(offset, offset + part.weight.numel())
                rounded, gradient = (flat[place].view(part.weight.shape) for flat in (self._rounded, self.gradient))
                self._parts.append((part.weight, place))
                views.append((rounded, gradient))
                offset = place.stop
            (a, gradient_a), (b, gradient_b) = views
            scaling = float(layers[name].scaling["default"])
            self.adapters[name] = Adapter(number, scaling, a, b, gradient_a, gradient_b)
        self._point_to(self.vector)
        self.table = bank.decoder.table(self.adapters) if bank.decoder is not None else None
        """Where the kernels find the adapters."""

    @contextlib.contextmanager
    def on_host(self, mark: "torch.cuda.Event | None") -> Iterator[None]:
        """The model with its weights on the host, as they were when the GPU had done what is before the mark."""
        with waiting_only_for(mark):
            host = self.vector.cpu()
        self._point_to(host)
        try:
            yield
        finally:
            self._point_to(self.vector)

    def _point_to(self, flat: torch.Tensor) -> None:
        """Make the model's weights views of a vector."""
        for weight, place in self._parts:
            weight.data = flat[place].view(weight.shape)

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
    norm: float
    """The gradient's, the loss scale in it."""
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


class _Computes(Protocol):
    """What takes the slots' tokens through the base: forward, backward, and what is made of some logits."""

    logits_at_once: int

    def forward(self, line: Line, slots: Sequence[Slot], draws: Sequence[int] | None) -> tuple[torch.Tensor, Any]: ...

    def backward(self, trace: Any, gradient: torch.Tensor) -> None: ...

    def score(
        self, logits: torch.Tensor, targets: torch.Tensor, learns: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]: ...


class Bank:
    """A frozen base and the slots on it. With nothing to grant, the base works as if there were no bank."""

    def __init__(self, base: "PreTrainedModel", config: RunConfig) -> None:
        self.base, self.dtype = base.requires_grad_(False), compute_dtype(config.quantization)
        self._shapes = copy.deepcopy(base.config)  # a pass changes the base's own for a while
        self.device = base.get_input_embeddings().weight.device
        self._head = base.get_output_embeddings()
        self._hooked = Hooked(base, config.trainer.gradient_checkpointing is True)
        self.decoder = by_hand(base, config)
        """On a GPU; None: the hooked base computes."""
        self._computes: _Computes = self.decoder or self._hooked
        self.taken = 0
        """Slots in which runs train."""
        self.capacity: int | None = None
        """How many wishes can be granted at once, if memory was once too small for more."""
        self._meanwhile: Callable[[], None] | None = None

    def draw(self, lora: LoraSettings, seed: int) -> "PeftModel":
        """A fresh adapter, the one that PEFT would draw from the seed, for a slot."""
        return add_adapter(self.skeleton(), lora, seed)

    def slot(self, lora: LoraSettings, seed: int, model: "PeftModel | None" = None) -> Slot:
        """A slot for an adapter that was drawn, or is drawn now."""
        slot = Slot(self, lora, seed, self.draw(lora, seed) if model is None else model)
        self._hooked.hook(set(slot.adapters))
        return slot

    def skeleton(self) -> "PreTrainedModel":
        """A model of the base's shapes, with next to no memory, for PEFT to put an adapter on."""
        with torch.device("meta"):
            skeleton: PreTrainedModel = type(self.base)(copy.deepcopy(self._shapes))
        for module in skeleton.modules():
            if isinstance(module, torch.nn.Linear):
                shape = module.weight.shape
                module.weight = torch.nn.Parameter(torch.zeros(1, 1).expand(shape), requires_grad=False)
        return skeleton

    def grant(self, wishes: Sequence[Wish], meanwhile: Callable[[], None] | None = None) -> list[Granted | Exception]:
        """Grant wishes of several slots, as many at once as memory allows.

        What fails for several is done again in halves, so that an error stands only for the wish that it is of.
        `meanwhile`, which must not raise, is called once: while a GPU computes, or afterwards.
        """
        self._meanwhile = meanwhile
        try:
            return self._grant_all(wishes)
        finally:
            self._meanwhile = None

    def _grant_all(self, wishes: Sequence[Wish]) -> list[Granted | Exception]:
        found: dict[int, Granted | Exception] = {}
        for kind in (Learning, Measuring):
            own = [wish for wish in wishes if isinstance(wish, kind)]
            size = self.capacity or len(own)
            for start in range(0, len(own), max(size, 1)):
                part = own[start : start + size]
                found |= zip(map(id, part), self._grant_some(part), strict=True)
        self._let_the_host_work()
        return [found[id(wish)] for wish in wishes]

    def _grant_some(self, wishes: Sequence[Any]) -> "Sequence[Granted | Exception]":
        try:
            return self.learn(wishes) if isinstance(wishes[0], Learning) else self.measure(wishes)
        except Exception as error:
            if len(wishes) == 1:
                traceback.clear_frames(error.__traceback__)  # they hold what did not fit
                return [error]
            size = len(wishes) // 2
            if out_of_memory(error):
                self.capacity = size
                log.warning("memory is too small for %d slots at once: %d from here on", len(wishes), size)
        free_memory()  # no exception is held any more, nor what its frames hold
        parts = (wishes[start : start + size] for start in range(0, len(wishes), size))
        return [granted for part in parts for granted in self._grant_some(part)]

    def _let_the_host_work(self) -> None:
        """Do what was asked for meanwhile, if it is not done."""
        meanwhile, self._meanwhile = self._meanwhile, None
        if meanwhile is not None:
            meanwhile()

    def _wait_for(self, numbers: torch.Tensor) -> list[Any]:
        """The numbers of a pass that a GPU was told to compute; until they are there the host works."""
        if self.device.type == "cuda":
            self._let_the_host_work()
        found: list[Any] = numbers.tolist()
        return found

    def learn(self, wishes: Sequence[Learning]) -> list[Learnt]:
        """One forward and backward of all wishes' batches together; gradients replace those in the slots."""
        began, mark = time.perf_counter(), told(self.device)
        line = Line([wish.rows for wish in wishes], self.device)
        shares = torch.cat(
            [
                torch.full((stop - start,), wish.share, device=self.device)
                for wish, (start, stop) in zip(wishes, line.answers, strict=True)
            ]
        )
        hidden, trace = self._computes.forward(line, self._slots(wishes), [wish.draw for wish in wishes])
        answers = self._answers(hidden, line, shares)
        del hidden
        assert answers.gradient is not None
        self._computes.backward(trace, answers.gradient)
        sums = torch.stack([answers.losses[start:stop].double().sum() for start, stop in line.answers])
        norms = torch.stack([wish.slot.gradient.norm() for wish in wishes]).double()
        numbers, done = torch.stack([sums, norms], 1), told(self.device)
        found = self._wait_for(numbers)  # once for all
        seconds = time.perf_counter() - began
        if mark is not None and done is not None:
            seconds = mark.elapsed_time(done) / 1000  # without what the host did longer
        return [Learnt(loss, norm, seconds) for loss, norm in found]

    def measure(self, wishes: Sequence[Measuring]) -> list[Evaluation]:
        """What each wish's adapter makes of its rows."""
        line = Line([wish.rows for wish in wishes], self.device)
        with torch.inference_mode():
            hidden, _ = self._computes.forward(line, self._slots(wishes), None)
            answers = self._answers(hidden, line, None)
        count = sum(len(wish.rows) for wish in wishes)
        sums = torch.zeros(count, dtype=torch.float64, device=self.device)
        losses = self._wait_for(sums.index_add(0, line.owners, answers.losses.double()))
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
        with self._hooked.speaking(slot) as base:
            yield base

    def _slots(self, wishes: Sequence[Wish]) -> list[Slot]:
        for wish in wishes:
            wish.slot.round()
        return [wish.slot for wish in wishes]

    def _answers(self, hidden: torch.Tensor, line: Line, shares: torch.Tensor | None) -> "_Answers":
        """Losses of the answers' tokens; by shares of them their gradient, without shares what was right.

        Some logits at a time: they are by far the largest tensors, so each is gone over as seldom as can be.
        """
        weight, computes = dense_weight(self._head), self._computes
        losses, right, gradients = [], [], []
        count = math.ceil(len(hidden) / computes.logits_at_once)
        size = 16 * math.ceil(len(hidden) / count / 16)  # alike, and no part a small rest
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            loss, likeliest, slope = computes.score(
                linear(hidden[part], weight), line.targets[part], shares is not None
            )
            losses.append(loss)
            right.append(likeliest)
            if shares is not None:
                assert slope is not None
                into_hidden = slope.to(hidden.dtype) @ weight
                gradients.append((into_hidden * shares[part, None]).to(hidden.dtype))
                del slope  # or two parts' logits would be in memory
        return _Answers(torch.cat(losses), torch.cat(right), torch.cat(gradients) if gradients else None)


def works_by_hand(shapes: "PreTrainedConfig", quantization: QuantizationSettings) -> bool:
    """Whether a base's decoder can be computed by hand.

    That is on a GPU of compute capability 8 or more on which Triton works, in 16 bits, without 8-bit products, with
    SwiGLU, and with heads whose blocks have room in its multiprocessors.
    """
    heads = getattr(shapes, "head_dim", None) or shapes.hidden_size // shapes.num_attention_heads
    return (
        newer_gpu(torch.device("cuda"))
        and compute_dtype(quantization).itemsize == 2
        and not quantization.load_in_8bit
        and shapes.hidden_act in ("silu", "swish")
        and heads <= 128
        and _kernels_work()
    )


@functools.cache
def _kernels_work() -> bool:
    """Triton may be missing, or the C compiler that it needs to start kernels."""
    try:
        from finetune.gpu import kernels

        kernels.gate(*torch.zeros(2, 16, device="cuda", dtype=torch.bfloat16))
    except Exception as error:
        log.warning("the GPU's kernels can't be built: training by PyTorch's own, slower operations (%s)", brief(error))
        return False
    return True


def by_hand(base: "PreTrainedModel", config: RunConfig) -> "Decoder | None":
    """The decoder of a base, where it can be computed so."""
    plain = type(base).__module__.startswith("transformers.")  # no remote code, which may mean something else
    if not plain or not works_by_hand(base.config, config.quantization):
        return None
    from finetune.gpu.decoder import Decoder

    return Decoder(base, config.trainer.gradient_checkpointing is True)


@dataclass(frozen=True)
class _Answers:
    losses: torch.Tensor
    """[answers' tokens] negative log-likelihoods, float32"""
    right: torch.Tensor
    """[answers' tokens] whether the model would have chosen the token; nobody asks where it learns"""
    gradient: torch.Tensor | None
    """[answers' tokens, width]"""
