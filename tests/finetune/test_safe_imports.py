"""Ctrl-C while modules are imported: it comes, but no module stays half imported."""

import importlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from finetune.engine.interrupt import Interrupt
from finetune.safe_imports import interrupts_wait_for_imports

SLOW_MODULE = """
import signal
signal.raise_signal(signal.SIGINT)
complete = True
"""
"""A module during whose import the user presses Ctrl-C."""


@pytest.fixture(autouse=True)
def raises_on_interrupt() -> Iterator[None]:
    """Pytest in the background of a shell ignores SIGINT."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture
def slow_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"slow_module_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(SLOW_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def import_and_wait(name: str) -> None:
    importlib.import_module(name)
    threading.Event().wait(10)


def test_an_import_ends_before_the_interrupt(slow_module: str) -> None:
    with pytest.raises(KeyboardInterrupt), interrupts_wait_for_imports():
        import_and_wait(slow_module)
    assert sys.modules[slow_module].complete
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_of_a_run_waits_too(slow_module: str) -> None:
    interrupt = Interrupt()
    interrupt.requested = True
    with pytest.raises(KeyboardInterrupt), interrupt.handle_signals():
        import_and_wait(slow_module)
    assert sys.modules[slow_module].complete


def test_outside_an_import_it_comes_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), interrupts_wait_for_imports():
        signal.raise_signal(signal.SIGINT)


def test_the_handler_of_before_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = signal.signal(signal.SIGINT, handle)
    try:
        with interrupts_wait_for_imports():
            signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is handle
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_without_a_handler_nothing_is_changed(handler: signal.Handlers) -> None:
    before = signal.signal(signal.SIGINT, handler)
    try:
        with interrupts_wait_for_imports():
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
