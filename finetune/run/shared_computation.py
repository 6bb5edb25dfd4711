"""A value that the first of several runs computes and that the others wait for."""

from collections.abc import Callable
from typing import Generic, TypeVar

from finetune.engine.steps import RunSteps

T = TypeVar("T")


class SharedComputation(Generic[T]):
    """A value that is computed once for all runs that train together.

    It is empty until a run computes it. Runs that ask meanwhile wait; if the computation fails, the
    next run computes it.
    """

    def __init__(self) -> None:
        self._value: T | None = None
        self._is_computing = False

    def get(self, compute: Callable[[], RunSteps[T]]) -> RunSteps[T]:
        """Return the value, computed by this run if no other run has begun to.

        Args:
            compute: The steps that compute the value; must not return None.
        """
        while self._is_computing:
            yield None
        if self._value is None:
            self._is_computing = True
            try:
                self._value = yield from compute()
            finally:
                self._is_computing = False
            # The runs that waited continue at the same time as this one.
            yield None
        return self._value
