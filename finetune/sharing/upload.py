"""Upload files to a model repository on the hub, all in one commit, or none."""

import logging
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from finetune.compat import hub_network_error
from finetune.console import summary_line
from finetune.errors import ConfigError, refusal

log = logging.getLogger(__name__)

T = TypeVar("T")

OWN_FILES = re.compile(
    r"adapter_.*|tokenizer.*|special_tokens_map\.json|added_tokens\.json|chat_template\.jinja|"
    r"generation_config\.json|vocab\.json|merges\.txt|promotion\.json"
)
"""Files of an adapter: those of an earlier upload that the new one does not have are removed."""

REASONS = {
    401: "the hub does not accept the token; `hf auth whoami` says whose it is",
    403: "the token may not write there",
    404: "the hub has no such owner or repository, or the token may not see it",
    409: "another commit came in between; publish again",
    412: "another commit came in between; publish again",
    413: "the hub finds the files too large",
    429: "the hub has had too many requests; publish again later",
}
"""What statuses of the hub's answers mean for an upload."""

FIRST_SERVER_ERROR = 500


@dataclass(frozen=True)
class Uploaded:
    """Where files are on the hub."""

    repository: str
    """As `owner/name`."""
    url: str
    commit: str
    changed: bool
    """Whether there is a new commit; False: the repository had these very files."""


def require_uploads(key: str, name: str) -> None:
    """Refuse an upload that can't succeed: an impossible name, no token, or no network wanted.

    Args:
        key: The flag or the config key that names the repository, for the error.
        name: The repository, as `owner/name`, or `name` for one of the token's owner.

    Raises:
        ConfigError: The reason.
    """
    from huggingface_hub import get_token, is_offline_mode
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        allowed = "must be OWNER/NAME of letters, digits, -, _ and . (96 at most)"
        raise refusal(key, name, allowed) from None
    if is_offline_mode():
        raise refusal(key, name, "HF_HUB_OFFLINE is set, and publishing needs the hub")
    token = get_token()
    if not token:
        reason = "there is no token: set HF_TOKEN, or run `hf auth login`"
        raise refusal(key, name, reason)
    if not token.isascii() or not token.isprintable():
        reason = "the token (HF_TOKEN, or of `hf auth login`) has characters that no token has"
        raise refusal(key, name, reason)


def create_repository(key: str, name: str, private: bool) -> str:
    """Create a model repository unless it exists, and return its full name `owner/name`.

    Args:
        key: For the error.
        name: `owner/name`, or `name` for one of the token's owner.
        private: Whether a new one is private.

    Raises:
        ConfigError: The hub refuses, or can't be reached.
    """
    from huggingface_hub import HfApi

    url = ask_to_write(
        key, name, lambda: HfApi().create_repo(name, private=private, exist_ok=True)
    )
    return str(url.repo_id)


def upload_files(
    key: str,
    repository: str,
    files: Mapping[str, Path | bytes],
    message: str,
    branch: str = "main",
) -> Uploaded:
    """Commit files to a branch of a repository.

    Files that have not changed are not uploaded again. Of an earlier upload, files of an adapter
    that are not among these are removed. After an error the branch is as it was.

    Args:
        key: For the error.
        repository: As `owner/name`.
        files: Contents by their names in the repository.
        message: The commit's message.
        branch: The branch; any but `main` is created if it is missing.

    Raises:
        ConfigError: The hub refuses, or can't be reached.
    """
    return ask_to_write(
        key, repository, lambda: _commit(repository, files, message, branch)
    )


def _commit(
    repository: str, files: Mapping[str, Path | bytes], message: str, branch: str
) -> Uploaded:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    if branch != "main":
        api.create_branch(repository, branch=branch, exist_ok=True)
    before = api.model_info(repository, revision=branch)
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    for name, content in files.items():
        operations.append(CommitOperationAdd(name, content))
    for sibling in before.siblings or []:
        name = sibling.rfilename
        if name not in files and OWN_FILES.fullmatch(name):
            operations.append(CommitOperationDelete(name))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # One commit. `upload_folder` makes several of a large folder.
        commit = api.create_commit(
            repository,
            operations,
            commit_message=message,
            revision=branch,
            parent_commit=before.sha,
        )
    for warning in caught:
        line = " ".join(str(warning.message).split())
        # Of the hub; others are notes to developers.
        if "README.md" in line:
            log.warning("%s: %s", repository, line)
    return Uploaded(
        repository=repository,
        url=f"{api.endpoint}/{repository}",
        commit=commit.oid,
        changed=commit.oid != before.sha,
    )


def ask_to_write(key: str, name: str, ask: Callable[[], T]) -> T:
    """Return what a call of the hub's library returns; its errors become one line.

    Raises:
        ConfigError: The hub refuses, or can't be reached. No token is in the message.
    """
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import logging as hub_logging

    # It says that nothing has changed, and when it tries again.
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    for library in ("httpx", "httpx2"):
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        return ask()
    except ConfigError:
        raise
    except HfHubHTTPError as error:
        raise refusal(key, name, _http_reason(error)) from None
    except (hub_network_error(), ConnectionError) as error:
        reason = f"the hub can't be reached ({type(error).__name__})"
        raise refusal(key, name, reason) from None
    # Of storage and of invalid cards: of any kind.
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, HfHubHTTPError):
            raise refusal(key, name, _http_reason(cause)) from None
        raise refusal(key, name, _without_token(summary_line(cause))) from None


def _http_reason(error: Exception) -> str:
    status = int(error.response.status_code)  # type: ignore[attr-defined]
    reason = REASONS.get(status)
    if reason is None and status >= FIRST_SERVER_ERROR:
        reason = "the hub has failed; publish again later"
    if reason is None:
        reason = _without_token(summary_line(error))
    return f"{reason} (HTTP {status})"


def _without_token(text: str) -> str:
    from huggingface_hub import get_token

    token = get_token()
    return text.replace(token, "…") if token else text
