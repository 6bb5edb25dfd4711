"""The bank: the adapters of all slots on one frozen base, which train and are measured together.

The tokens of all slots go through the base as one line (`batch`); each linear layer adds to every
slot's own stretch of it what that slot's adapter makes of it. So a slot's numbers are those it would have alone,
to the rounding of a matrix product. On a GPU that is computed by hand (`gpu.decoder`), else by the base's own
modules (`autograd_backend`).
"""

import contextlib
import copy
import logging
import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from finetune.config.schema import LoraSettings, RunConfig
from finetune.engine.evaluation import Evaluation
from finetune.engine.packed.autograd_backend import AutogradBackend
from finetune.engine.packed.backend import Backend, gpu_decoder
from finetune.engine.packed.batch import PackedBatch
from finetune.engine.packed.requests import Evaluate, ForwardBackward, ForwardBackwardResult, PackedRequest, Response
from finetune.engine.packed.slot import Slot
from finetune.model.adapter import add_adapter
from finetune.model.device import record_event
from finetune.model.memory import free_memory, out_of_memory
from finetune.model.quantization import compute_dtype, dense_weight

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


log = logging.getLogger(__name__)


class Bank:
    """A frozen base and the slots on it. With nothing to grant, the base works as if there were no bank."""

    def __init__(self, base: "PreTrainedModel", config: RunConfig) -> None:
        self.base, self.dtype = base.requires_grad_(False), compute_dtype(config.quantization)
        self._shapes = copy.deepcopy(base.config)  # a pass changes the base's own for a while
        self.device = base.get_input_embeddings().weight.device
        self._head = base.get_output_embeddings()
        self._autograd = AutogradBackend(base, config.trainer.gradient_checkpointing is True)
        self.decoder = gpu_decoder(base, config)
        """On a GPU; None: the hooked base computes."""
        self._backend: Backend = self.decoder or self._autograd
        self.slots_in_use = 0
        """Slots in which runs train."""
        self.capacity: int | None = None
        """How many wishes can be granted at once, if memory was once too small for more."""
        self._host_work: Callable[[], None] | None = None

    def draw_adapter(self, lora: LoraSettings, seed: int) -> "PeftModel":
        """A fresh adapter, the one that PEFT would draw from the seed, for a slot."""
        return add_adapter(self._skeleton(), lora, seed)

    def create_slot(self, lora: LoraSettings, seed: int, model: "PeftModel | None" = None) -> Slot:
        """A slot for an adapter that was drawn, or is drawn now."""
        slot = Slot(self, lora, seed, self.draw_adapter(lora, seed) if model is None else model)
        if self.decoder is not None:
            slot.table = self.decoder.table(slot.adapters)
        self._autograd.hook(set(slot.adapters))
        return slot

    def _skeleton(self) -> "PreTrainedModel":
        """A model of the base's shapes, with next to no memory, for PEFT to put an adapter on."""
        with torch.device("meta"):
            skeleton: PreTrainedModel = type(self.base)(copy.deepcopy(self._shapes))
        for module in skeleton.modules():
            if isinstance(module, torch.nn.Linear):
                shape = module.weight.shape
                module.weight = torch.nn.Parameter(torch.zeros(1, 1).expand(shape), requires_grad=False)
        return skeleton

    def execute(
        self, requests: Sequence[PackedRequest], host_work: Callable[[], None] | None = None
    ) -> list[Response | Exception]:
        """Grant wishes of several slots, as many at once as memory allows.

        What fails for several is done again in halves, so that an error stands only for the wish that it is of.
        `host_work`, which must not raise, is called once: while a GPU computes, or afterwards.
        """
        self._host_work = host_work
        try:
            return self._execute_all(requests)
        finally:
            self._host_work = None

    def _execute_all(self, requests: Sequence[PackedRequest]) -> list[Response | Exception]:
        found: dict[int, Response | Exception] = {}
        for kind in (ForwardBackward, Evaluate):
            own = [request for request in requests if isinstance(request, kind)]
            size = self.capacity or len(own)
            for start in range(0, len(own), max(size, 1)):
                part = own[start : start + size]
                found |= zip(map(id, part), self._execute_some(part), strict=True)
        self._let_the_host_work()
        return [found[id(request)] for request in requests]

    def _execute_some(self, requests: Sequence[Any]) -> "Sequence[Response | Exception]":
        try:
            return (
                self.forward_backward(requests) if isinstance(requests[0], ForwardBackward) else self.evaluate(requests)
            )
        except Exception as error:
            if len(requests) == 1:
                traceback.clear_frames(error.__traceback__)  # they hold what did not fit
                return [error]
            size = len(requests) // 2
            if out_of_memory(error):
                self.capacity = size
                log.warning("memory is too small for %d slots at once: %d from here on", len(requests), size)
        free_memory()  # no exception is held any more, nor what its frames hold
        parts = (requests[start : start + size] for start in range(0, len(requests), size))
        return [response for part in parts for response in self._execute_some(part)]

    def _let_the_host_work(self) -> None:
        """Call `host_work`, unless it has been called already."""
        host_work, self._host_work = self._host_work, None
        if host_work is not None:
            host_work()

    def _wait_for(self, numbers: torch.Tensor) -> list[Any]:
        """The numbers of a pass that a GPU was told to compute; until they are there the host works."""
        if self.device.type == "cuda":
            self._let_the_host_work()
        found: list[Any] = numbers.tolist()
        return found

    def forward_backward(self, requests: Sequence[ForwardBackward]) -> list[ForwardBackwardResult]:
        """One forward and backward of all wishes' batches together; gradients replace those in the slots."""
        began, mark = time.perf_counter(), record_event(self.device)
        line = PackedBatch([request.rows for request in requests], self.device)
        shares = torch.cat(
            [
                torch.full((stop - start,), request.loss_weight, device=self.device)
                for request, (start, stop) in zip(requests, line.answers, strict=True)
            ]
        )
        hidden, trace = self._backend.forward(
            line, self._slots(requests), [request.dropout_step for request in requests]
        )
        answers = self._answers(hidden, line, shares)
        del hidden
        assert answers.gradient is not None
        self._backend.backward(trace, answers.gradient)
        sums = torch.stack([answers.losses[start:stop].double().sum() for start, stop in line.answers])
        norms = torch.stack([request.slot.gradient.norm() for request in requests]).double()
        numbers, done = torch.stack([sums, norms], 1), record_event(self.device)
        found = self._wait_for(numbers)  # once for all
        seconds = time.perf_counter() - began
        if mark is not None and done is not None:
            seconds = mark.elapsed_time(done) / 1000  # without what the host did longer
        return [ForwardBackwardResult(loss, norm, seconds) for loss, norm in found]

    def evaluate(self, requests: Sequence[Evaluate]) -> list[Evaluation]:
        """What each wish's adapter makes of its rows."""
        line = PackedBatch([request.rows for request in requests], self.device)
        with torch.inference_mode():
            hidden, _ = self._backend.forward(line, self._slots(requests), None)
            answers = self._answers(hidden, line, None)
        count = sum(len(request.rows) for request in requests)
        sums = torch.zeros(count, dtype=torch.float64, device=self.device)
        losses = self._wait_for(sums.index_add(0, line.owners, answers.losses.double()))
        tokens = torch.bincount(line.owners, minlength=count).tolist()
        found, first = [], 0
        for request, (start, stop) in zip(requests, line.answers, strict=True):
            own = slice(first, first + len(request.rows))
            right = int(answers.right[start:stop].sum())
            found.append(Evaluation(tuple(losses[own]), tuple(tokens[own]), right / max(stop - start, 1)))
            first = own.stop
        return found

    @contextlib.contextmanager
    def generation_model(self, slot: Slot) -> Iterator["PreTrainedModel"]:
        """The base with one slot's adapter applied, for text generation."""
        slot.round()
        with self._autograd.generation_model(slot) as base:
            yield base

    def _slots(self, requests: Sequence[PackedRequest]) -> list[Slot]:
        for request in requests:
            request.slot.round()
        return [request.slot for request in requests]

    def _answers(self, hidden: torch.Tensor, line: PackedBatch, shares: torch.Tensor | None) -> "_Answers":
        """Losses of the answers' tokens; by shares of them their gradient, without shares what was right.

        Some logits at a time: they are by far the largest tensors, so each is gone over as seldom as can be.
        """
        weight, backend = dense_weight(self._head), self._backend
        losses, right, gradients = [], [], []
        count = math.ceil(len(hidden) / backend.logits_chunk)
        size = 16 * math.ceil(len(hidden) / count / 16)  # alike, and no part a small rest
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            loss, likeliest, slope = backend.score(linear(hidden[part], weight), line.targets[part], shares is not None)
            losses.append(loss)
            right.append(likeliest)
            if shares is not None:
                assert slope is not None
                into_hidden = slope.to(hidden.dtype) @ weight
                gradients.append((into_hidden * shares[part, None]).to(hidden.dtype))
                del slope  # or two parts' logits would be in memory
        return _Answers(torch.cat(losses), torch.cat(right), torch.cat(gradients) if gradients else None)


@dataclass(frozen=True)
class _Answers:
    losses: torch.Tensor
    """[answers' tokens] negative log-likelihoods, float32"""
    right: torch.Tensor
    """[answers' tokens] whether the model would have chosen the token; nobody asks where it learns"""
    gradient: torch.Tensor | None
    """[answers' tokens, width]"""
