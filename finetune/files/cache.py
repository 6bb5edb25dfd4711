"""The cache folder of packaged models and tokenised rows."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return FINETUNE_CACHE if it is set, else `finetune` in XDG_CACHE_HOME or `~/.cache`."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune"
    return Path(os.environ.get("FINETUNE_CACHE") or default)
