"""The generator protocol of a run: it yields requests and receives responses.

A run is a generator, so that its code reads like a plain loop while several runs train in one
process: `sweeps.study.pack` collects the requests of all runs and executes them together, `drive`
executes those of a single run one by one.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Executor(Protocol):
    """Executes the requests of several runs together."""

    capacity: int | None
    """Number of requests that fit into memory at once; None: no limit is known."""
    answer_tokens: int
    """Tokens of the longest answer that a request for answers is expected to generate."""

    def execute(
        self, requests: Sequence[Any], host_work: Callable[[], None] | None = None
    ) -> Sequence[Any]:
        """Execute requests.

        Args:
            requests: The requests of all runs, each addressed to this executor.
            host_work: Called once while a GPU computes; must not raise.

        Returns:
            The responses in the order of the requests, an exception in place of a failed one.
        """


class Request(Protocol):
    """A computation that a run asks for."""

    @property
    def executor(self) -> Executor:
        """Executes the request, together with simultaneous requests of other runs."""

    @property
    def rounds_to_answers(self) -> int | None:
        """How many requests from now the run asks for answers; 0: this one does; None: never."""


RunSteps = Generator[Request | None, Any, T]
"""The steps of a run, which may be interleaved with those of other runs in one process.

The generator yields a request and receives its response. It yields None where all other runs of
the same round should reach their next request first.
"""


def drive(steps: RunSteps[T]) -> T:
    """Execute the steps of a single run, and return the generator's result."""
    response: Any = None
    try:
        while True:
            request = _resume(steps, response)
            # None: there are no other runs to wait for, so the run goes on at once.
            response = None
            if request is not None:
                response = _execute(request)
            # It refers to the run's slot, which the run's end frees.
            request = None
    # The return value of a generator is in the exception that its end raises.
    except StopIteration as end:
        result: T = end.value
        return result


def _execute(request: Request) -> Any:
    """Return the response to a request; an interruption is one too."""
    try:
        (response,) = request.executor.execute([request])
        return response
    # The run has to know of it, because it says how it can be continued.
    except KeyboardInterrupt as error:
        return error


def _resume(steps: RunSteps[T], response: Any) -> Request | None:
    """Give a generator its response, or raise it there if it is an exception."""
    # Raised where the run waits for the response, so that its `with` blocks end in order.
    if isinstance(response, BaseException):
        return steps.throw(response)
    return steps.send(response)
