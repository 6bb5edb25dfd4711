"""Triton's interpreter, without what it does again and again."""

import dataclasses
from typing import Any

import pytest


def patch_language_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a launch replace the functions of `triton.language` once for each module of kernels.

    The interpreter replaces them by NumPy's at each launch, and again whenever a kernel calls a
    helper function, where nothing is left to replace (Triton 3.7, `runtime/interpreter.py`:
    `InterpretedFunction.__call__`). That search took half of a kernel's time.
    """
    from triton.runtime import interpreter

    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[str] = set()

    def launch_anew(executor: Any, *arguments: Any, **named: Any) -> None:
        replaced.clear()
        launch(executor, *arguments, **named)

    def replace_once(function: Any) -> Any:
        if function.__module__ in replaced:
            return None
        replaced.add(function.__module__)
        return replace(function)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
    monkeypatch.setattr(interpreter, "_patch_lang", replace_once)


def leave_overflow_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute a kernel's integers of 32 bits as a GPU does, which takes a third of its time less."""
    from triton.runtime.interpreter import interpreter_builder

    options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)
    monkeypatch.setattr(interpreter_builder, "options", options)
