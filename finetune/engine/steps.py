"""The generator protocol of a run: it yields requests and receives responses."""

from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Executor(Protocol):
    """Computes the requests of several runs together."""

    capacity: int | None
    """How many requests fit into memory at once, where that was found out; None: no limit is known."""

    def execute(self, requests: Sequence[Any], host_work: Callable[[], None] | None = None) -> Sequence[Any]:
        """Responses to the requests, in their order; an exception in place of one that failed."""


class Request(Protocol):
    """Something that a run wants computed."""

    @property
    def executor(self) -> Executor:
        """What computes it, together with the requests that other runs have at the same time."""


RunSteps = Generator[Request | None, Any, T]
"""Work that takes turns with other runs' in one process.

It yields what it wants computed and is sent what came of it; None lets all others of the same turn come as far first.
"""


def drive(work: RunSteps[T]) -> T:
    """Do work to its end with nobody beside it."""
    answer: Any = None
    try:
        while True:
            request = work.throw(answer) if isinstance(answer, Exception) else work.send(answer)
            answer = None if request is None else request.executor.execute([request])[0]
    except StopIteration as end:
        result: T = end.value
        return result
