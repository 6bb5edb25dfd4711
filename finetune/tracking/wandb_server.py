"""Whether W&B's server takes what runs send, for all runs of this process."""

import functools
import logging
import threading
import time
from typing import TYPE_CHECKING

from finetune.compat import on_wandb_upload_failure

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

server_failure = threading.Event()
"""Set when the server has not answered, or has refused data: later runs don't wait for it."""

GIVEN_UP_SECONDS = 2
"""Seconds to wait for the end of a run whose server has failed already."""


def finish_run(run: "wandb.Run", exit_code: int) -> None:
    """Finish an online run. The first one whose server is away waits for it, later ones do not.

    Args:
        run: The open W&B run.
        exit_code: By it, W&B shows a run as finished or as failed.

    Raises:
        Exception: Whatever W&B raises.
    """
    errors: list[Exception] = []

    def finish() -> None:
        try:
            run.finish(exit_code=exit_code)
        except TimeoutError:
            fail("its server does not answer")
        except Exception as error:
            errors.append(error)

    finishing = threading.Thread(target=finish, daemon=True)
    finishing.start()
    # W&B's own limit does not hold for artifacts.
    end = time.monotonic() + run.settings.finish_timeout + GIVEN_UP_SECONDS
    while finishing.is_alive() and not server_failure.is_set():
        finishing.join(0.05)
        if time.monotonic() > end:
            fail("its server does not answer")
    # Where the server has failed, the end is on disk at once, and the rest is in vain.
    finishing.join(GIVEN_UP_SECONDS)
    if errors:
        raise errors[0]


def fail(reason: str) -> None:
    """Keep later runs of this process offline, and say so once."""
    if not server_failure.is_set():
        server_failure.set()
        log.warning("W&B: %s; runs of this process are kept offline", reason)


@functools.cache
def watch_uploads() -> None:
    """From now on, notice if the server refuses what a run sends."""
    on_wandb_upload_failure(lambda: fail("its server has refused data"))
