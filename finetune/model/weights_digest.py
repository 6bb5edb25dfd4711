"""What tells two saved adapters apart: the hash of their weights."""

import hashlib
from pathlib import Path

WEIGHTS = "adapter_model.safetensors"
"""PEFT's file of an adapter's weights."""


def weights_digest(adapter: Path) -> str:
    """Return the SHA-256 of an adapter's weights."""
    with (adapter / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
