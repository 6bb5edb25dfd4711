"""Versions of the packages and the commit that produced a result."""

import contextlib
import functools
import subprocess
import sys
from importlib import metadata
from pathlib import Path

RECORDED_PACKAGES = (
    "accelerate", "bitsandbytes", "datasets", "hydra-core", "numpy", "optuna", "peft", "tokenizers",
    "torch", "transformers", "trl", "wandb",
)  # fmt: skip


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on, by name."""
    python = ".".join(map(str, sys.version_info[:3]))
    version_of = {"python": python}
    for package in RECORDED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            version_of[package] = metadata.version(package)
    return version_of


@functools.cache
def git_commit() -> str | None:
    """Return the commit of the checkout that this code runs from, None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        process = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        # Git is not installed.
        return None
    if process.returncode != 0:
        return None
    return process.stdout.strip()
