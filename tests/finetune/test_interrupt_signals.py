"""Ctrl-C comes as what it is, and no module stays half imported by it."""

import contextlib
import importlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from finetune import interrupt_signals
from finetune.console import run_command
from finetune.engine.interrupt import Interrupt
from finetune.errors import ConfigError
from finetune.in_process import in_process
from finetune.interrupt_signals import IMPORT_SYSTEM, interrupts_wait_for_imports

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


FAILURES = {
    "a library's": (AttributeError("no parent"), True),
    "a wrapped one": (RuntimeError("composition failed"), True),
    "one of the machine": (OSError(28, "No space left on device"), False),
    "one for the user": (ConfigError("lora.r=0: must be at least 1"), False),
}
"""Errors that are raised as Ctrl-C is handled, and whether they stand for it."""


def fail_at_interrupt(error: Exception) -> None:
    """Raise an error in place of Ctrl-C and without a link to it, as OmegaConf may."""
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        error.__suppress_context__ = True
    raise error


@pytest.mark.parametrize("failure", FAILURES)
def test_a_call_raises_ctrl_c_for_the_error_of_a_library(failure: str) -> None:
    error, stands_for_interrupt = FAILURES[failure]
    expected = KeyboardInterrupt if stands_for_interrupt else type(error)
    with pytest.raises(expected), in_process():
        fail_at_interrupt(error)


@pytest.mark.parametrize("failure", FAILURES)
def test_a_command_tells_of_ctrl_c_for_the_error_of_a_library(
    failure: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error, stands_for_interrupt = FAILURES[failure]
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: fail_at_interrupt(error))
    if stands_for_interrupt:
        assert (ended.value.code, capsys.readouterr().err) == (
            3,
            "error: interrupted\n",
        )
    else:
        assert ended.value.code == 1
        assert str(error.args[-1]) in capsys.readouterr().err


def test_an_error_long_after_a_handled_ctrl_c_is_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a chat, which goes on after an interrupted answer."""

    def chat() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        time.sleep(0.02)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(interrupt_signals, "REPLACED_SECONDS", 0.01)
    with pytest.raises(RuntimeError, match="out of memory"), in_process():
        chat()


def test_without_ctrl_c_an_error_is_itself() -> None:
    with pytest.raises(AttributeError), in_process():
        raise AttributeError("no parent")


def test_ctrl_c_as_a_call_begins_leaves_a_process_in_which_the_next_call_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Not of interest here, and slow after many tests.
    monkeypatch.setattr("finetune.in_process._release_memory", lambda: None)
    monkeypatch.setattr("finetune.in_process._loggers", list)
    with in_process():
        pass  # Imports, during which Ctrl-C would wait.
    number = 1
    while interrupted_at_its_beginning(number):
        with in_process():
            number += 1
    assert number > 50


def interrupted_at_its_beginning(number: int) -> bool:
    """Press Ctrl-C at one of the places at which Python looks for signals as a call begins.

    They are where a function in Python begins and where one in C has ended.

    Returns:
        Whether there are so many.
    """
    passed = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal passed
        is_import = frame.f_code.co_filename == IMPORT_SYSTEM
        passed += event in ("call", "c_return") and not is_import
        if passed == number:
            sys.setprofile(None)
            signal.raise_signal(signal.SIGINT)

    sys.setprofile(profile)
    try:
        with in_process():
            sys.setprofile(None)
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return False
