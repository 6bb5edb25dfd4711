"""The bank: the adapters of all slots on one frozen base, trained and evaluated together.

The tokens of all slots go through the base as one packed batch; each linear layer adds the
contribution of every slot's adapter to that slot's own tokens. So a slot's numbers are those that
it would have alone, up to the rounding of matrix products.
"""

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy
import torch

from finetune.config.schema import RunConfig
from finetune.config.sections.lora import LoraSettings
from finetune.engine.decoding import generate_tokens
from finetune.engine.encoded_prompts import Answers
from finetune.engine.evaluation import Evaluation
from finetune.engine.packed.autograd_backend import AutogradBackend
from finetune.engine.packed.backend import Backend, gpu_decoder
from finetune.engine.packed.backend_probe import backend_failure
from finetune.engine.packed.batch import (
    BatchDevices,
    BatchLayout,
    PackedBatch,
    lay_out,
)
from finetune.engine.packed.dora import set_magnitudes
from finetune.engine.packed.embedding_noise import embedding_noise
from finetune.engine.packed.execution import Execution
from finetune.engine.packed.losses import TokenLosses, token_losses
from finetune.engine.packed.pass_figures import PassFigures
from finetune.engine.packed.pass_timer import PassTimer
from finetune.engine.packed.pipeline import PassSteps, group_size, interleave
from finetune.engine.packed.requests import (
    Evaluate,
    ForwardBackward,
    ForwardBackwardResult,
    Generate,
    PackedRequest,
    Response,
    Wait,
)
from finetune.engine.packed.row_by_row import recurrent_layers
from finetune.engine.packed.slot import Slot
from finetune.engine.probes import Shortcut, model_type_of
from finetune.errors import refusal
from finetune.model.adapter_templates import AdapterTemplates
from finetune.model.architectures import logit_transform_of
from finetune.model.device import to_device
from finetune.model.initial_adapter import load_initial_adapter
from finetune.model.layer_devices import block_devices, count_stages
from finetune.model.memory import free_memory
from finetune.model.origin import share_origin
from finetune.model.quantization import compute_dtype

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


_Request = TypeVar("_Request", ForwardBackward, Evaluate)
_AnyRequest = TypeVar("_AnyRequest", bound=PackedRequest)


@dataclass
class _TrainingPass:
    """A forward pass whose backward pass follows."""

    batch: PackedBatch
    hidden: torch.Tensor | None
    trace: Any
    loss_weights: torch.Tensor

    def take_hidden(self) -> torch.Tensor:
        """Return `hidden` and let go of it, which makes room for the backward pass."""
        hidden = self.hidden
        assert hidden is not None
        self.hidden = None
        return hidden


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
        self.device = base.get_input_embeddings().weight.device
        self.is_asynchronous = self.device.type == "cuda"
        """Whether passes are queued, and computed while the host goes on."""
        # A copy, because a pass changes the base's own config while it lasts.
        self._base_config = copy.deepcopy(base.config)
        self._adapters = AdapterTemplates(
            self._skeleton, shares_weights=self.is_asynchronous
        )
        self._head = base.get_output_embeddings()
        self._head_device = self._head.weight.device
        self._stages = count_stages(base)
        """GPUs that compute one after the other: the layers of a base may be on several."""
        self._output_device = self.device
        self._slot_counts: Counter[torch.device] = Counter()
        """Slots on each GPU, where each computes all blocks for its own."""
        if self._stages > 1:
            devices = block_devices(base.get_decoder())
            self._output_device = devices[-1]
            self._slot_counts.update(dict.fromkeys(devices, 0))
        self._probes_other_gpus = True
        """Whether all are probed before there is a slot on one."""
        self._logit_transform = logit_transform_of(base.config)
        self.shares_prefixes = not recurrent_layers(base)
        """Whether a common prefix of a batch's rows is computed once. The state of a recurrent
        layer runs through one sequence, so no two rows go on from a prefix."""
        # Made even beside the GPU decoder, because text generation needs the base's own modules:
        # the decoder has no cache of keys and values.
        self._autograd = AutogradBackend(base, bool(config.trainer.checkpointing))
        self.backend: Backend = (
            backend or gpu_decoder(base, config, borrows_blocks) or self._autograd
        )
        self._quantization = config.quantization
        self.slots_in_use = 0
        """Slots in which runs train now, counted by `SharedResources.slot`."""
        self._execution = Execution(
            self._compute, lambda trains: self.backend.release_memory(trains)
        )
        self.answer_tokens = config.evaluation.max_new_tokens
        """Tokens of the longest answer of the last generation; at first its limit."""
        self._host_work: Callable[[], None] | None = None

    def initialise_adapter(self, lora: LoraSettings, seed: int) -> "PeftModel":
        """Initialise an adapter exactly as PEFT does on the real base.

        Args:
            lora: The adapter's settings.
            seed: Seed of the random initialisation.

        Returns:
            The adapter on a copy of the base without weights.
        """
        model = self._adapters.create(lora, seed)
        share_origin(self.base, model.get_base_model())
        if lora.use_dora:
            set_magnitudes(model, self.base)
        load_initial_adapter(model, lora)
        return model

    def create_slot(
        self,
        lora: LoraSettings,
        seed: int,
        model: "PeftModel | None" = None,
    ) -> Slot:
        """Create a slot for a run.

        Args:
            lora: The adapter's settings.
            seed: The run's seed.
            model: The adapter from `initialise_adapter`; None: it is initialised now.

        Raises:
            ConfigError: A packed batch does not compute what the base's own code computes, or the
                backend can't train the adapter.
        """
        if model is None:
            model = self.initialise_adapter(lora, seed)
        if self.backend.borrows_blocks and self._probes_other_gpus:
            # While no slot depends on how the base is computed.
            for device in self._slot_counts:
                if self.backend.borrows_blocks:
                    self._check_backend(self._attached_slot(lora, seed, model, device))
            self._probes_other_gpus = False
        slot = self._attached_slot(lora, seed, model, self._emptiest_gpu())
        self._check_backend(slot)
        if slot.is_on_one_device and not self.backend.borrows_blocks:
            slot = self._attached_slot(lora, seed, model, None)
            self._check_backend(slot)
        self._slot_counts[slot.device] += 1
        return slot

    def remove_slot(self, slot: Slot) -> None:
        """Leave a slot's place to the next one."""
        self._slot_counts[slot.device] -= 1

    def _emptiest_gpu(self) -> torch.device | None:
        """The GPU that is to compute all blocks for the next slot; None: none does."""
        if not self.backend.borrows_blocks:
            return None
        return min(self._slot_counts, key=lambda device: self._slot_counts[device])

    def _batch_devices(self, slot: Slot) -> BatchDevices:
        """Return where a pass of a slot reads the tensors of its batch."""
        first = last = slot.device
        if not slot.is_on_one_device:
            first, last = self.device, self._output_device
        return BatchDevices(self.device, first, last, self._head_device)

    def _attached_slot(
        self,
        lora: LoraSettings,
        seed: int,
        model: "PeftModel",
        device: torch.device | None,
    ) -> Slot:
        """Create a slot that the backends know.

        Raises:
            ConfigError: The backend can't train the adapter.
        """
        slot = Slot(self, lora, seed, model, device)
        if slot.is_beyond_lora and self._stages > 1:
            raise refusal(
                "trainer.gpus",
                self._stages,
                "a base on several GPUs has no DoRA and no trained biases; allowed: 1",
            )
        if slot.is_beyond_lora and self.backend is not self._autograd:
            # As where a run of another machine is evaluated: training goes to TRL by `selection`.
            reason = (
                "no DoRA and no trained biases with the kernels on a GPU; allowed: trl"
            )
            raise refusal("trainer.engine", "packed", reason)
        self.backend.attach(slot)
        # Text is generated by the base's own modules, whatever backend trains.
        self._autograd.attach(slot)
        return slot

    def _check_backend(self, slot: Slot) -> None:
        """Probe the backend, once for a base; autograd replaces a GPU decoder that is wrong.

        Raises:
            ConfigError: Autograd is wrong too.
        """
        if self.backend is not self._autograd:
            if self._failure(Shortcut.GPU_DECODER, slot) is None:
                return
            self.backend = self._autograd
            if slot.is_on_one_device:
                # Autograd can't compute for it: another one is made.
                return
        failure = self._failure(Shortcut.PACKED_BATCH, slot)
        if failure is not None:
            details = f"({model_type_of(self.base)}: {failure}); allowed: trl"
            reason = f"{Shortcut.PACKED_BATCH.value} {details}"
            raise refusal("trainer.engine", "packed", reason)

    def _failure(self, shortcut: Shortcut, slot: Slot) -> str | None:
        return backend_failure(
            shortcut,
            backend=self.backend,
            autograd=self._autograd,
            base=self.base,
            slot=slot,
            devices=self._batch_devices(slot),
            quantization=self._quantization,
        )

    def _skeleton(self) -> "PreTrainedModel":
        """A model of the base's shapes that takes next to no memory."""
        config = copy.deepcopy(self._base_config)
        with torch.device("meta"):
            skeleton: PreTrainedModel = type(self.base)(config)
        for name, module in skeleton.named_modules():
            if isinstance(module, torch.nn.Linear):
                # PEFT initialises the adapter on the device of the layer's weight, which must not
                # be meta. An expanded tensor has the shape, and memory for one element.
                one_element = torch.zeros(1, 1).expand(module.weight.shape)
                module.weight = torch.nn.Parameter(one_element, requires_grad=False)
                if module.bias is not None:
                    # A slot may train it.
                    bias = self.base.get_submodule(name).bias
                    copied = bias.detach().to("cpu", torch.float32, copy=True)
                    module.bias = torch.nn.Parameter(copied, requires_grad=False)
        return skeleton

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
            group = _alternating(of_type)
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
        by_device = _by_device(requests)
        timers = {device: PassTimer(device) for device in by_device}
        # In a pipeline adapters are copied between GPUs before the passes, and their gradients
        # after them: a copy waits for what both GPUs have to compute.
        slots = self._refreshed_slots(requests)
        groups = self._groups(requests)
        passes = interleave([self._forward(group) for group in groups])
        group_losses = interleave([self._backward(each) for each in passes])
        losses = _by_request(groups, group_losses)
        for slot in slots:
            slot.collect_gradient()
        results: dict[int, ForwardBackwardResult] = {}
        for device, of_device in by_device.items():
            norms = [request.slot.gradient.norm() for request in of_device]
            timers[device].stop()
            slot_losses = torch.stack([losses[id(request)] for request in of_device])
            figures = PassFigures(
                slot_losses, torch.stack(norms).double(), timers[device]
            )
            for index, request in enumerate(of_device):
                results[id(request)] = ForwardBackwardResult(figures, index)
        if self.is_asynchronous:
            for request in requests:
                if request.prepare_next is not None:
                    request.prepare_next()
            self._run_host_work()
        return [results[id(request)] for request in requests]

    def _groups(self, requests: Sequence[_Request]) -> list[Sequence[_Request]]:
        """Divide requests into those that are computed together.

        On several GPUs each GPU has a group of its own, whose blocks it computes. Or one group's
        blocks are computed by a GPU while another computes the next blocks of the group before
        (`pipeline`).
        """
        if self.backend.borrows_blocks:
            return list(_by_device(requests).values())
        size = group_size(len(requests), self._stages)
        return [
            requests[start : start + size] for start in range(0, len(requests), size)
        ]

    def _forward(self, requests: Sequence[ForwardBackward]) -> PassSteps[_TrainingPass]:
        batch = self._packed_batch(requests)
        slots = [request.slot for request in requests]
        dropout_steps = [request.dropout_step for request in requests]
        with embedding_noise(self.base, requests, batch):
            steps = self.backend.forward(batch, slots, dropout_steps)
        return self._finish_forward(requests, batch, steps)

    def _finish_forward(
        self,
        requests: Sequence[ForwardBackward],
        batch: PackedBatch,
        steps: PassSteps[tuple[torch.Tensor, Any]],
    ) -> PassSteps[_TrainingPass]:
        hidden, trace = yield from steps
        # While a GPU computes the forward pass.
        loss_weights = self._loss_weights(requests, batch)
        return _TrainingPass(batch, hidden, trace, loss_weights)

    def _backward(self, training_pass: _TrainingPass) -> PassSteps[list[torch.Tensor]]:
        """Compute the gradients of a pass; return the slots' losses."""
        # Not the head's, which may be the first one: the loss belongs to the last blocks.
        yield self._output_device
        batch = training_pass.batch
        result = self._token_losses(
            training_pass.take_hidden(), batch.targets, training_pass.loss_weights
        )
        assert result.gradient is not None
        yield from self.backend.backward(training_pass.trace, result.gradient)
        # Each slot's own tokens are summed alone: NaN in one slot must not reach another.
        # In float64 the sum hardly depends on the order of its terms.
        losses = []
        for start, stop in batch.target_spans:
            slot_losses = result.losses[start:stop]
            losses.append(slot_losses.double().sum())
        return losses

    def _token_losses(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        loss_weights: torch.Tensor | None,
    ) -> TokenLosses:
        return token_losses(
            self.backend,
            self._head,
            self._logit_transform,
            hidden.to(self._head_device),
            targets.to(self._head_device),
            loss_weights,
        )

    def _loss_weights(
        self, requests: Sequence[ForwardBackward], batch: PackedBatch
    ) -> torch.Tensor:
        """The weight of each answer token's loss [answer tokens]."""
        counts = [stop - start for start, stop in batch.target_spans]
        weights = numpy.array([request.loss_weight for request in requests], "float32")
        repeated = torch.from_numpy(weights.repeat(counts))
        return to_device(repeated, self._head_device)

    def evaluate(self, requests: Sequence[Evaluate]) -> list[Evaluation]:
        """Compute the losses of several slots' rows in one pass, without dropout.

        Args:
            requests: One for each slot.

        Returns:
            The evaluation of each request's rows.
        """
        self._refreshed_slots(requests)
        groups = self._groups(requests)
        with torch.inference_mode():
            figures = interleave([self._evaluate(group) for group in groups])
        losses, tokens, correct = self._fetch(torch.cat(figures, 1))
        evaluations: dict[int, Evaluation] = {}
        first_row = 0
        for request in itertools.chain(*groups):
            rows = slice(first_row, first_row + len(request.rows))
            evaluation = Evaluation(
                row_losses=tuple(losses[rows]),
                row_tokens=tuple(map(int, tokens[rows])),
                row_correct=tuple(map(int, correct[rows])),
            )
            evaluations[id(request)] = evaluation
            first_row = rows.stop
        return [evaluations[id(request)] for request in requests]

    def _evaluate(self, requests: Sequence[Evaluate]) -> PassSteps[torch.Tensor]:
        """Compute the loss of each row, its answer tokens, and how many of these are predicted.

        Returns:
            The three figures, float64 [3, rows].
        """
        batch = self._packed_batch(requests)
        slots = [request.slot for request in requests]
        hidden, _ = yield from self.backend.forward(batch, slots, None)
        result = self._token_losses(hidden, batch.targets, None)
        row_count = sum(len(request.rows) for request in requests)
        # In float64 the sum of a row hardly depends on the order of its terms.
        losses = result.losses.double()
        figures = torch.stack(
            [losses, torch.ones_like(losses), result.correct.double()]
        )
        rows = batch.target_rows.to(losses.device)
        return figures.new_zeros(3, row_count).index_add(1, rows, figures)

    def generate(self, requests: Sequence[Generate]) -> list[Answers]:
        """Answer the prompts of several slots together, each token for all of them at once.

        Args:
            requests: One for each slot.

        Returns:
            The answers to each request's prompts.
        """
        slots = self._refreshed_slots(requests)

        def adapt(runs: Sequence[int]) -> AbstractContextManager["PreTrainedModel"]:
            return self._autograd.adapted_rows([slots[run] for run in runs])

        prompts = [request.prompts for request in requests]
        answers = generate_tokens(self.base, prompts, self._quantization, adapt)
        lengths = [len(tokens) for run in answers for tokens in run]
        self.answer_tokens = max(lengths, default=self.answer_tokens)
        # Keys and values are large, and of other sizes than what training needs.
        free_memory()
        return answers

    def _packed_batch(
        self, requests: Sequence[ForwardBackward | Evaluate]
    ) -> PackedBatch:
        layouts = [self._layout(request) for request in requests]
        return PackedBatch(layouts, self._batch_devices(requests[0].slot))

    def _layout(self, request: ForwardBackward | Evaluate) -> BatchLayout:
        if isinstance(request, ForwardBackward) and request.layout is not None:
            return request.layout
        group_size = request.group_size if self.shares_prefixes else 1
        return lay_out(request.rows, group_size)

    def _refreshed_slots(self, requests: Sequence[PackedRequest]) -> list[Slot]:
        """Refresh the weights that products read; return the slots."""
        for request in requests:
            request.slot.refresh_weights()
        return [request.slot for request in requests]

    def _fetch(self, figures: torch.Tensor) -> list[Any]:
        """Copy a pass's figures to the host."""
        if self.is_asynchronous:
            self._run_host_work()
        # The kernels are queued by now; `tolist` waits until the GPU has computed them.
        values: list[Any] = figures.tolist()
        return values

    def _run_host_work(self) -> None:
        """Call `host_work`, unless it has been called already."""
        host_work = self._host_work
        # First, so that it is called once.
        self._host_work = None
        if host_work is not None:
            host_work()


def _by_device(
    requests: Sequence[_AnyRequest],
) -> dict[torch.device, list[_AnyRequest]]:
    """The requests of the slots on each device."""
    by_device: dict[torch.device, list[_AnyRequest]] = {}
    for request in requests:
        by_device.setdefault(request.slot.device, []).append(request)
    return by_device


def _alternating(requests: Sequence[PackedRequest]) -> list[PackedRequest]:
    """Order requests so that their slots' devices take turns."""
    rounds = itertools.zip_longest(*_by_device(requests).values())
    return [each for turn in rounds for each in turn if each is not None]


def _by_request(
    groups: Sequence[Sequence[ForwardBackward]], values: Sequence[list[torch.Tensor]]
) -> dict[int, torch.Tensor]:
    """The value of each request of each group, by the request's id."""
    requests = itertools.chain(*groups)
    flat = itertools.chain(*values)
    return {id(request): value for request, value in zip(requests, flat, strict=True)}
