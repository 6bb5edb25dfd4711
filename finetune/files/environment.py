"""Versions of the packages and the commit that produced a result."""

import contextlib
import functools
import subprocess
import sys
from importlib import metadata
from pathlib import Path

RECORDED_PACKAGES = (
    "accelerate", "bitsandbytes", "datasets", "hydra-core", "numpy", "optuna", "peft", "tokenizers", "torch",
    "transformers", "trl", "wandb",
)  # fmt: skip


@functools.cache
def versions() -> dict[str, str]:
    """Python's version and those of the packages that a result depends on."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in RECORDED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


@functools.cache
def git_commit() -> str | None:
    """The commit of the checkout that this code runs from, None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):
        asked = subprocess.run(command, capture_output=True, text=True)
        if asked.returncode == 0:
            return asked.stdout.strip()
    return None
