"""Ask the Hugging Face hub, and use its local cache where the hub can't be reached."""

import logging
from collections.abc import Callable
from typing import TypeVar

from finetune.compat import hub_network_error
from finetune.errors import refusal

log = logging.getLogger(__name__)

HUB_TIMEOUT = 5
"""Seconds to wait for the hub's first answer."""

T = TypeVar("T")


def ask_hub(
    key: str,
    name: str,
    ask: Callable[[], T],
    in_cache: Callable[[], T],
    instead: str,
) -> T:
    """Return the hub's answer, or its local cache's if the hub is offline or HF_HUB_OFFLINE is set.

    Args:
        key: The config key that names the repository, for error messages.
        name: The repository, as `owner/name`.
        ask: Asks the hub.
        in_cache: Answers from the local cache; raises any exception if the cache does not hold the
            repository.
        instead: What the user can do without the hub, the end of the error message.

    Raises:
        ConfigError: The repository is gated or missing, its revision is missing, or neither the hub
            nor the cache has an answer.
    """
    from huggingface_hub import is_offline_mode

    # The hub's library logs each request by one of these.
    for library in ("httpx", "httpx2"):
        logging.getLogger(library).setLevel(logging.WARNING)
    reason = "HF_HUB_OFFLINE is set"
    try:
        if not is_offline_mode():
            return _ask_online(key, name, ask)
    except (hub_network_error(), OSError) as error:
        reason = f"the hub can't be reached ({type(error).__name__})"
    # Of any kind: each library that reads the cache has its own error for what is not there.
    try:
        answer = in_cache()
    except Exception:
        uncached = f"{reason} and nothing of it is cached; {instead}"
        raise refusal(key, name, uncached) from None
    log.info("%s=%s: %s; using what is cached", key, name, reason)
    return answer


def _ask_online(key: str, name: str, ask: Callable[[], T]) -> T:
    """Return the hub's answer; refuse a name that the hub does not give access to."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return ask()
    # First, because to the hub's library a gated repository is a kind of missing one.
    except GatedRepoError:
        reason = "is gated: accept its terms on the hub and set HF_TOKEN"
        raise refusal(key, name, reason) from None
    except RevisionNotFoundError:
        raise refusal(key, name, "the hub has no such revision of it") from None
    except RepositoryNotFoundError:
        reason = "the hub has no such repository (a private one needs HF_TOKEN)"
        raise refusal(key, name, reason) from None
