"""Recorded steps: the pass that computes one token of each row is launched at once (CUDA graphs).

A step computes little, and Python launches hundreds of kernels for it: a GPU waits for most of the
time. So a step is recorded and then launched again for each token. What it reads is copied to where
the recorded kernels read it; the cache stays where it is (`step_cache`).
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
from finetune.model.experts import expert_modules
from finetune.model.layer_devices import count_stages

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
    # The host waits for how many tokens go to each expert.
    if expert_modules(base):
        return False
    # Others have no mask that hides the tokens to come.
    return attention_implementation_of(base.config) == "sdpa"


def _is_on_one_gpu(base: Any) -> bool:
    return next(base.parameters()).is_cuda and count_stages(base) == 1


def stop_recording(model: torch.nn.Module) -> None:
    """Record no more steps of a base, or of a base with an adapter."""
    _unrecordable.add(base_of(model))


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


class _Steps:
    """The passes of a base with one cache."""

    def __init__(self, base: Any, cache: StepCache) -> None:
        self._base = base
        self._forward = base.forward
        self._cache = cache
        self._shapes: list[Any] = []
        """Of the tensors that the last step had."""
        self._inputs: dict[str, Any] = {}
        """What the recorded step reads."""
        self._outputs: list[Any] = []
        self._replay: Callable[[], None] | None = None

    def compute(self, inputs: dict[str, Any]) -> Any:
        """Compute a pass, and count its tokens.

        Args:
            inputs: Arguments of the base's forward.

        Returns:
            The base's output; that of a step until the next one.
        """
        output = self._pass(inputs)
        self._cache.advance(inputs["input_ids"].shape[1])
        return output

    def _pass(self, inputs: dict[str, Any]) -> Any:
        if self._cache.tokens == 0 or self._base in _unrecordable:
            return self._forward(**inputs)
        shapes = [(tensor.shape, tensor.dtype) for tensor in _tensors(inputs)]
        if shapes != self._shapes:
            # Kernels have to be launched once before they can be recorded.
            self._shapes = shapes
            self._replay = None
            return self._forward(**inputs)
        if self._replay is None and not self._record(inputs):
            return self._forward(**inputs)
        assert self._replay is not None
        for recorded, tensor in zip(
            _tensors(self._inputs), _tensors(inputs), strict=True
        ):
            recorded.copy_(tensor)
        self._replay()
        return self._outputs[-1]

    def _record(self, inputs: dict[str, Any]) -> bool:
        """Record a step; return whether that was possible."""
        self._inputs = _copies(inputs)
        self._outputs = []

        def launch() -> None:
            with _autocast_without_cache():
                self._outputs.append(self._forward(**self._inputs))

        try:
            self._replay = record_on_gpu(launch)
        except RuntimeError as error:
            _unrecordable.add(self._base)
            end_recording()
            log.info(
                "tokens are generated without recorded steps, which would be faster (%s)",
                summary_line(error),
            )
            return False
        return True


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


def record_on_gpu(launch: Callable[[], None]) -> Callable[[], None]:
    """Record what a function launches on the current GPU, and return what launches it again."""
    return _pool(torch.cuda.current_device()).record(launch)


@functools.cache
def _pool(gpu: int) -> "_LastingPool":
    """Where a process records the steps of a GPU: its memory is used again and again."""
    return _LastingPool()


class _LastingPool(GraphPool):
    """Memory that outlives what is recorded in it."""

    def __init__(self) -> None:
        super().__init__()
        number = torch.zeros(1, device="cuda")
        # PyTorch lets go of memory that no recording uses, and never uses it again.
        self._first = self.record(number.zero_)  # type: ignore[arg-type]
