"""Studies: many runs that search, prune, resume and survive.

From Python:

    study = sweeps.search("study=s1", "n_trials=20")
    study = sweeps.load_study("s1")

Both return a `Study`. A mistake in the input raises `finetune.ConfigError`, Ctrl-C
`KeyboardInterrupt`.
"""

import importlib
from typing import TYPE_CHECKING

from finetune.interrupt_signals import interrupts_wait_for_imports

if TYPE_CHECKING:
    from sweeps.api import Study, Winner, load_study, search

__all__ = ["Study", "Winner", "load_study", "search"]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import what loads Hydra when it is first used: importing the package stays fast."""
        if name not in __all__:
            raise AttributeError(f"module 'sweeps' has no attribute {name!r}")
        with interrupts_wait_for_imports():
            return getattr(importlib.import_module("sweeps.api"), name)

    def __dir__() -> list[str]:
        """List the names that are imported at their first use too, for Tab."""
        return sorted({*globals(), *__all__})
