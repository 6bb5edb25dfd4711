"""QLoRA fine-tuning runs, from a config to an adapter with its evaluation.

From Python:

    run = finetune.train("model=llama2_7b", "lora=r64")
    run = finetune.load("latest")

Both return a `Run`. A mistake in the input raises `ConfigError`, Ctrl-C `KeyboardInterrupt`.
"""

import importlib
from typing import TYPE_CHECKING

from finetune.errors import ConfigError, Interrupted
from finetune.interrupt_signals import interrupts_wait_for_imports
from finetune.version import __version__

if TYPE_CHECKING:
    from finetune.api import EvaluationResult, MergedModel, Run, load, train

__all__ = [
    "ConfigError",
    "EvaluationResult",
    "Interrupted",
    "MergedModel",
    "Run",
    "__version__",
    "load",
    "train",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import what loads Hydra when it is first used: importing the package stays fast."""
        if name not in __all__:
            raise AttributeError(f"module 'finetune' has no attribute {name!r}")
        with interrupts_wait_for_imports():
            return getattr(importlib.import_module("finetune.api"), name)

    def __dir__() -> list[str]:
        """List the names that are imported at their first use too, for Tab."""
        return sorted({*globals(), *__all__})
