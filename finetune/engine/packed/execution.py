"""Executes requests of one type together, as many at once as memory allows."""

import logging
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from finetune.engine.packed.requests import ForwardBackward, Generate, Response
from finetune.errors import is_out_of_memory_error
from finetune.model.memory import free_memory

log = logging.getLogger(__name__)


class Execution:
    """Executes requests, and again in halves where several at once fail."""

    def __init__(
        self,
        compute: Callable[[Sequence[Any]], list[Response]],
        release_memory: Callable[[bool], str | None],
    ) -> None:
        """No limit has been met yet.

        Args:
            compute: Returns the responses to requests of one type.
            release_memory: See `Backend.release_memory`.
        """
        self._compute = compute
        self._release_memory = release_memory
        self.capacity: int | None = None
        """How many requests fit into memory at once; None: no limit has been met."""

    def execute(self, requests: Sequence[Any]) -> list[Response | Exception]:
        """Execute requests of one type.

        A group of requests that fails is executed again in halves, so that an error is returned
        only for the request that causes it.

        Args:
            requests: At most one for each slot.

        Returns:
            The response to each request, or the exception that it caused.
        """
        # At least 1 where there are no requests: the step of a range can't be 0.
        size = max(self.capacity or len(requests), 1)
        responses = []
        for start in range(0, len(requests), size):
            responses += self._execute_chunk(requests[start : start + size])
        return responses

    def _execute_chunk(self, requests: Sequence[Any]) -> list[Response | Exception]:
        half = len(requests) // 2
        try:
            return self._execute_once(requests)
        except Exception as error:
            if len(requests) == 1:
                # The response outlives this call, and its frames hold the tensors of the pass.
                traceback.clear_frames(error.__traceback__)
                return [error]
            # Text is generated in batches that fit, so this is a single prompt that does not.
            is_generation = isinstance(requests[0], Generate)
            if is_out_of_memory_error(error) and not is_generation:
                self.capacity = half
                log.warning(
                    "memory is too small for %d slots at once; %d from now on",
                    len(requests),
                    half,
                )
        # Outside of the except block, where the exception and the tensors that its frames hold
        # are gone.
        free_memory()
        responses = []
        for start in range(0, len(requests), half):
            responses += self._execute_chunk(requests[start : start + half])
        return responses

    def _execute_once(self, requests: Sequence[Any]) -> list[Response | Exception]:
        """Execute requests together; again where memory only made passes faster."""
        while True:
            try:
                return list(self._compute(requests))
            except Exception as error:
                change = None
                if is_out_of_memory_error(error):
                    trains = isinstance(requests[0], ForwardBackward)
                    change = self._release_memory(trains)
                if change is None:
                    raise
            # Outside of the except block, where the exception's frames hold no tensors.
            log.warning("memory is short: %s, which is slower", change)
            free_memory()
