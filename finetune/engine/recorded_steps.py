"""Recorded steps: the pass that computes one token of each row is one launch (CUDA graphs).

A step computes little, and Python launches hundreds of kernels for it: a GPU waits for most of the
time. So the kernels of a step are recorded, and launched together for each token. What they read is
copied to where the recorded ones read it; the cache stays where it is (`step_cache`).
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch

from finetune.compat import attention_implementation_of
from finetune.console import summary_line
from finetune.engine.graph_pool import GraphPool, end_recording
from finetune.engine.probes import base_of
from finetune.engine.step_cache import StepCache
from finetune.errors import is_out_of_memory_error
from finetune.model.architectures import scaled_positions
from finetune.model.experts import expert_modules
from finetune.model.layer_devices import count_stages
from finetune.model.memory import free_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Records what a function launches, and returns what launches it again."""

_unrecordable: WeakSet[torch.nn.Module] = WeakSet()
"""Bases whose steps could not be recorded."""


def can_record(model: torch.nn.Module) -> bool:
    """Whether to try to record the steps of a base, or of a base with an adapter."""
    base = base_of(model)
    if base in _unrecordable or not _is_on_one_gpu(base):
        return False
    # The host waits for how many tokens go to each expert, and for the longest row.
    if expert_modules(base) or scaled_positions(base.config) is not None:
        return False
    # Others have no mask that hides places that are not filled yet.
    return attention_implementation_of(base.config) == "sdpa"


def _is_on_one_gpu(base: Any) -> bool:
    return next(base.parameters()).is_cuda and count_stages(base) == 1


@contextlib.contextmanager
def recorded_steps(model: "PreTrainedModel", cache: object) -> Iterator[None]:
    """Let a model count the tokens of a `StepCache`, and record its steps.

    Args:
        model: In evaluation mode; its adapters stay as they are.
        cache: That of its calls; with another kind of cache nothing changes.
    """
    if not isinstance(cache, StepCache):
        yield
        return
    base = base_of(model)
    before = vars(base).get("forward")
    steps = _Steps(base, cache)
    # transformers asks for its arguments' names.
    base.forward = functools.wraps(base.forward)(lambda **inputs: steps.compute(inputs))
    try:
        yield
    finally:
        del base.forward
        if before is not None:
            base.forward = before
        steps.free()


class _Steps:
    """The passes of a base with one cache."""

    def __init__(self, base: Any, cache: StepCache) -> None:
        self._base = base
        self._forward = base.forward
        self._cache = cache
        self._is_recording = True
        self._kind: object = None
        """What distinguishes the last step from others."""
        self._inputs: dict[str, Any] = {}
        """What the recorded step reads."""
        self._outputs: list[Any] = []
        self._replay: Callable[[], None] | None = None
        self._record: Record | None = None

    def compute(self, inputs: dict[str, Any]) -> Any:
        """Compute a pass, and count its tokens.

        Args:
            inputs: Arguments of the base's forward.

        Returns:
            The base's output. The next step overwrites that of a step.
        """
        if inputs.get("past_key_values") is not self._cache:
            return self._forward(**inputs)
        output = self._pass(inputs)
        self._cache.advance(inputs["input_ids"].shape[1])
        return output

    def _pass(self, inputs: dict[str, Any]) -> Any:
        if self._cache.tokens == 0 or not self._is_recording:
            return self._forward(**inputs)
        kind = _kind(inputs)
        if kind != self._kind:
            # Kernels have to be launched once before they can be recorded.
            self._kind = kind
            self._replay = None
            return self._forward(**inputs)
        if self._replay is None and not self._try_to_record(inputs):
            return self._forward(**inputs)
        assert self._replay is not None
        for recorded, tensor in zip(
            _tensors(self._inputs), _tensors(inputs), strict=True
        ):
            recorded.copy_(tensor)
        self._replay()
        return self._outputs[-1]

    def _try_to_record(self, inputs: dict[str, Any]) -> bool:
        """Record a step; return whether that was possible."""
        self._inputs = _copies(inputs)
        self._outputs = []

        def launch() -> None:
            with _autocast_without_cache():
                self._outputs.append(self._forward(**self._inputs))

        self._record = self._record or recorder()
        try:
            self._replay = self._record(launch)
        except RuntimeError as error:
            self._is_recording = False
            end_recording()
            if is_out_of_memory_error(error):
                # While something is recorded, unused memory cannot be returned to the GPU.
                free_memory()
                return False
            _unrecordable.add(self._base)
            log.info(
                "tokens are generated without recorded steps, which would be faster (%s)",
                summary_line(error),
            )
            return False
        return True

    def free(self) -> None:
        """Let go of what is recorded, and return its memory to the GPU."""
        if self._record is not None:
            self._inputs = {}
            self._outputs = []
            self._replay = self._record = None
            free_memory()


def _kind(inputs: object) -> object:
    """What distinguishes a step's arguments from those of a step that was recorded."""
    if isinstance(inputs, torch.Tensor):
        return inputs.shape, inputs.dtype
    if isinstance(inputs, dict):
        return {name: _kind(value) for name, value in inputs.items()}
    # A list is another one in each step, so that a step with one is never recorded.
    is_plain = inputs is None or isinstance(inputs, bool | int | float | str)
    return inputs if is_plain else id(inputs)


def _tensors(inputs: object) -> list[torch.Tensor]:
    """The tensors among arguments, those in dictionaries included."""
    if isinstance(inputs, torch.Tensor):
        return [inputs]
    tensors = []
    if isinstance(inputs, dict):
        for value in inputs.values():
            tensors += _tensors(value)
    return tensors


def _copies(inputs: Any) -> Any:
    """Arguments with tensors of their own."""
    if isinstance(inputs, torch.Tensor):
        return inputs.clone()
    if isinstance(inputs, dict):
        return {name: _copies(value) for name, value in inputs.items()}
    return inputs


def _autocast_without_cache() -> Any:
    """Autocast as it is, but it caches no weights: they would be in the recording's memory."""
    return torch.autocast(
        "cuda",
        dtype=torch.get_autocast_dtype("cuda"),
        enabled=torch.is_autocast_enabled("cuda"),
        cache_enabled=False,
    )


def recorder() -> Record:
    """Return what records on the current GPU, in memory of its own."""
    return GraphPool().record
