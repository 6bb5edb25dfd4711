"""Errors of a study's storage."""

from finetune.errors import Interrupted


class StorageLost(Interrupted):
    """The database stayed out of reach.

    Running trials stay running in the storage, and a later worker adopts them.
    """

    by_user = False


class WorkersLost(Interrupted):
    """Workers were killed again and again."""

    by_user = False


class LeaseLost(Interrupted):
    """Another worker has taken a trial, because this one was silent for too long."""

    by_user = False
    goes_on_elsewhere = True
