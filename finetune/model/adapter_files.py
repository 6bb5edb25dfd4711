"""The files of a saved adapter, as PEFT names them, and the hash that tells two adapters apart."""

import hashlib
from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"

WEIGHTS = "adapter_model.safetensors"

MODEL_CARD = "README.md"


def weights_digest(adapter: Path) -> str:
    """Return the SHA-256 of an adapter's weights."""
    with (adapter / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
