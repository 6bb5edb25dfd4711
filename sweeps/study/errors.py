"""Errors of a study's storage."""

from finetune.errors import Interrupted

KEY = "hydra.sweeper.storage"
"""The key that errors of the storage name."""


class StorageLost(Interrupted):
    """The database stayed out of reach. Running trials stay running, and are adopted later."""
