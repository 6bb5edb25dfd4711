"""Errors of a study's storage."""

from finetune.errors import Interrupted

KEY = "hydra.sweeper.storage"
"""The config key that errors of the storage name."""


class StorageLost(Interrupted):
    """The database stayed out of reach.

    Running trials stay running in the storage, and a later worker adopts them.
    """
