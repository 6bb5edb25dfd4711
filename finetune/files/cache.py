"""The cache folder of packaged models and tokenised rows."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return FINETUNE_CACHE if it is set, else `finetune` in XDG_CACHE_HOME or `~/.cache`."""
    folder = os.environ.get("FINETUNE_CACHE")
    if folder:
        return Path(folder)
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user_cache) / "finetune"
