"""The bank: the adapters of all slots on one frozen base, trained and evaluated together.

The tokens of all slots go through the base as one packed batch; each linear layer adds the
contribution of every slot's adapter to that slot's own tokens. So a slot's numbers are those that
it would have alone, up to the rounding of matrix products.

The bank executes the slots' requests. `bank_slots.py` creates the slots; `training_pass.py`,
`evaluation_pass.py` and `generation_pass.py` compute.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from finetune.config.schema import RunConfig
from finetune.engine.encoded_prompts import Answers
from finetune.engine.evaluation import Evaluation
from finetune.engine.packed.backend import Backend
from finetune.engine.packed.backends import Backends
from finetune.engine.packed.bank_slots import BankSlots
from finetune.engine.packed.base_devices import BaseDevices
from finetune.engine.packed.evaluation_pass import queue_evaluation
from finetune.engine.packed.execution import Execution
from finetune.engine.packed.fresh_adapters import FreshAdapters
from finetune.engine.packed.generation_pass import generate_answers
from finetune.engine.packed.packed_base import PackedBase
from finetune.engine.packed.requests import (
    Evaluate,
    ForwardBackward,
    ForwardBackwardResult,
    Generate,
    PackedRequest,
    Response,
    Wait,
)
from finetune.engine.packed.requests_by_device import alternating
from finetune.engine.packed.row_by_row import recurrent_layers
from finetune.engine.packed.training_pass import compute_gradients
from finetune.model.quantization import compute_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Bank:
    """A frozen base and the slots on it. Between calls the base works as if there were no bank."""

    def __init__(
        self,
        base: "PreTrainedModel",
        config: RunConfig,
        backend: Backend | None = None,
        borrows_blocks: bool = False,
    ) -> None:
        """Freeze a base and choose the backend.

        Args:
            base: The loaded base; its linear layers are hooked in place.
            config: The config of any run on this base; they agree on what concerns the base.
            backend: Computes training and evaluation; None: the GPU decoder where it is
                supported, else autograd.
            borrows_blocks: Whether each GPU of a spread base computes all blocks for its own slots
                (`Plan.borrows_blocks`), where the base's weights allow it.
        """
        self.base = base.requires_grad_(False)
        self.dtype = compute_dtype(config.quantization)
        devices = BaseDevices.of_base(base)
        self.device = devices.embedding
        self.is_asynchronous = self.device.type == "cuda"
        """Whether passes are queued, and computed while the host goes on."""
        self.shares_prefixes = not recurrent_layers(base)
        """Whether a common prefix of a batch's rows is computed once. The state of a recurrent
        layer runs through one sequence, so no two rows go on from a prefix."""
        self.adapters = FreshAdapters(base, shares_weights=self.is_asynchronous)
        """Creates the adapters of slots."""
        self.backends = Backends(base, config, devices, backend, borrows_blocks)
        """Compute the base with the adapters of slots."""
        self.slots = BankSlots(self, self.adapters, self.backends, devices)
        """Creates slots."""
        self.slots_in_use = 0
        """Slots in which runs train now, counted by `SharedResources.slot`."""
        self.answer_tokens = config.evaluation.max_new_tokens
        """Tokens of the longest answer of the last generation; at first its limit."""
        self._packed_base = PackedBase(
            base, self.backends, devices, self.shares_prefixes
        )
        self._quantization = config.quantization
        self._execution = Execution(
            self._compute, lambda trains: self.backends.current.release_memory(trains)
        )
        self._host_work: Callable[[], None] | None = None

    @property
    def capacity(self) -> int | None:
        """How many requests fit into memory at once; None: no limit has been met."""
        return self._execution.capacity

    @capacity.setter
    def capacity(self, capacity: int | None) -> None:
        self._execution.capacity = capacity

    def execute(
        self,
        requests: Sequence[PackedRequest],
        host_work: Callable[[], None] | None = None,
    ) -> list[Response | Exception]:
        """Execute the requests of several slots, as many at once as memory allows.

        Args:
            requests: At most one for each slot.
            host_work: Called once, while the GPU computes or else afterwards; must not raise.

        Returns:
            The response to each request, or the exception that it caused.
        """
        self._host_work = host_work
        try:
            return self._execute_by_type(requests)
        finally:
            self._host_work = None

    def _execute_by_type(
        self, requests: Sequence[PackedRequest]
    ) -> list[Response | Exception]:
        # By the requests' ids: they hold lists of rows and so have no hash.
        responses: dict[int, Response | Exception] = {}
        for request in requests:
            if isinstance(request, Wait):
                responses[id(request)] = None
        # One after the other: a pass either trains all of its slots, with dropout and a trace for
        # the gradients, or evaluates all of them, or generates text for all of them.
        for request_type in (ForwardBackward, Evaluate, Generate):
            of_type = [
                request for request in requests if isinstance(request, request_type)
            ]
            # If memory is short for all, it is for half of them: half of those of each GPU.
            group = alternating(of_type)
            group_responses = self._execution.execute(group)
            for request, response in zip(group, group_responses, strict=True):
                responses[id(request)] = response
        # On a CPU, or if no pass got far enough to call it.
        self._run_host_work()
        return [responses[id(request)] for request in requests]

    def _compute(self, requests: Sequence[Any]) -> list[Response]:
        """Return the responses to requests of one type."""
        if isinstance(requests[0], ForwardBackward):
            return list(self.forward_backward(requests))
        if isinstance(requests[0], Evaluate):
            return list(self.evaluate(requests))
        return list(self.generate(requests))

    def forward_backward(
        self, requests: Sequence[ForwardBackward]
    ) -> list[ForwardBackwardResult]:
        """Compute the gradients of several slots' batches in one pass.

        Args:
            requests: One for each slot.

        Returns:
            The result of each request, which a GPU may still be computing. The gradients replace
            those in the slots.
        """
        results = compute_gradients(self._packed_base, requests)
        if self.is_asynchronous:
            for request in requests:
                if request.prepare_next is not None:
                    request.prepare_next()
            self._run_host_work()
        return results

    def evaluate(self, requests: Sequence[Evaluate]) -> list[Evaluation]:
        """Compute the losses of several slots' rows in one pass, without dropout.

        Args:
            requests: One for each slot.

        Returns:
            The evaluation of each request's rows.
        """
        evaluation = queue_evaluation(self._packed_base, requests)
        if self.is_asynchronous:
            self._run_host_work()
        # The kernels are queued by now; `read` waits until the GPU has computed them.
        return evaluation.read()

    def generate(self, requests: Sequence[Generate]) -> list[Answers]:
        """Answer the prompts of several slots together, each token for all of them at once.

        Args:
            requests: One for each slot.

        Returns:
            The answers to each request's prompts.
        """
        answers = generate_answers(
            self.base, self.backends.autograd, requests, self._quantization
        )
        lengths = [len(tokens) for run in answers for tokens in run]
        self.answer_tokens = max(lengths, default=self.answer_tokens)
        return answers

    def _run_host_work(self) -> None:
        """Call `host_work`, unless it has been called already."""
        host_work = self._host_work
        # First, so that it is called once.
        self._host_work = None
        if host_work is not None:
            host_work()
