"""One value, kept as long as it is asked for with the same key."""

import sys
from collections.abc import Callable
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Cached(Generic[Key, Value]):
    """Keeps the last value that was created, with its key.

    Args:
        frees_memory: Whether dropping a value also returns memory to the GPU and the system.
            That takes a while, so small values do without.
    """

    def __init__(self, frees_memory: bool = True) -> None:
        self._entry: tuple[Key, Value] | None = None
        self._frees_memory = frees_memory

    def get(self, key: Key, create: Callable[[], Value]) -> Value:
        """Return the value for a key. One for another key is dropped before it is created."""
        if self._entry is None or self._entry[0] != key:
            self.drop()
            self._entry = (key, create())
        return self._entry[1]

    def peek(self) -> tuple[Key, Value] | None:
        """Return the key and the value, None if there is none."""
        return self._entry

    def drop(self) -> None:
        """Forget the value, and free its memory."""
        if self._entry is None:
            return
        self.forget()
        # A process that has not imported torch holds no memory of it, and need not import it.
        if self._frees_memory and "torch" in sys.modules:
            from finetune.model.memory import free_memory

            free_memory()

    def forget(self) -> None:
        """Forget the value without freeing its memory at once, where several are forgotten."""
        self._entry = None
