"""MLflow's store: a local SQLite database, or what MLFLOW_TRACKING_URI names."""

import functools
import logging
import os
import re
import shlex
import warnings
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from finetune.files.cache import cache_folder
from finetune.files.lock import file_lock

if TYPE_CHECKING:
    from mlflow import MlflowClient

DATABASE = "mlflow.db"
"""MLflow's default database in the working directory, which `mlflow ui` shows."""

LOCAL = "sqlite:///"

SERVER_SETTINGS = {
    # Seconds, and further attempts: a server that is away must not hold up the run for long.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    # Else MLflow reports each import to its makers.
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Variables of MLflow that are set unless the user has set them."""


def environment_address() -> str | None:
    """Return the address of the environment, None if there is none."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def local_address() -> str:
    """Return the address of the database in the working directory."""
    return f"{LOCAL}{Path(DATABASE).absolute()}"


def open_store(address: str) -> "MlflowClient":
    """Open a store, once in a process; a local database is created if it is missing.

    Raises:
        Exception: Whatever MLflow raises.
    """
    # Each time, because MLflow reads them at each request and a call from Python restores them.
    for name, value in SERVER_SETTINGS.items():
        os.environ.setdefault(name, value)
    return _open(address)


@functools.cache
def _open(address: str) -> "MlflowClient":
    with warnings.catch_warnings():
        # SQLAlchemy's, about what MLflow still uses of it.
        warnings.filterwarnings("ignore", message="The ``noload`` loader strategy")
        from mlflow import MlflowClient

        # It reports each table that it creates. Its import sets the level too.
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        if not address.startswith(LOCAL):
            return MlflowClient(address)
        # Workers of a study begin at once, and each would create the tables.
        cache_folder().mkdir(parents=True, exist_ok=True)
        with file_lock(cache_folder() / ".mlflow.lock"):
            return MlflowClient(address)


def show_store(address: str) -> str:
    """Return how the user looks at a store: a command for a database, or the server's address.

    Passwords are left out.
    """
    scheme = urlsplit(address).scheme or "MLflow"
    return show_command(address) or show_url(address) or f"a store of {scheme}"


def show_command(address: str) -> str | None:
    """Return the command that shows a database on this machine; None: a server has the store."""
    if not address.startswith(LOCAL):
        return None
    path = os.path.relpath(address.removeprefix(LOCAL))
    return f"mlflow ui --backend-store-uri {shlex.quote(f'{LOCAL}{path}')}"


def show_url(address: str) -> str | None:
    """Return a server's address without a password; None: the store has no page."""
    parts = urlsplit(address)
    if not parts.scheme.startswith("http"):
        return None
    host = re.sub(r".*@", "", parts.netloc)
    return f"{parts.scheme}://{host}{parts.path}"
