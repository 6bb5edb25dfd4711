"""The hub as a registry: a repository, of which the branch ALIAS has the deployed adapter."""

import json
from collections.abc import Callable
from pathlib import Path

from finetune.errors import refusal
from finetune.json_safe import json_safe
from finetune.model.adapter_files import WEIGHTS
from finetune.sharing.publication import Extra, Target, publish_run
from finetune.sharing.upload import ask_to_write
from finetune.tracking.registry import Lineage, Registry, Version

UNAUTHORIZED = 401

LINEAGE = "promotion.json"
"""File of the lineage in the repository."""


class HubRegistry(Registry):
    """A repository on the hub.

    A branch and no tag: a commit moves it, whereas a tag would be removed and set again.

    Args:
        target: The repository.
        make_extra: Returns what is published beside the run, by the lineage.

    Raises:
        ConfigError: The repository is named without its owner.
    """

    title = "the hub"

    def __init__(self, target: Target, make_extra: Callable[[Lineage], Extra]) -> None:
        if "/" not in target.name:
            raise refusal(target.key, target.name, "must be OWNER/NAME")
        self._target = target
        self._make_extra = make_extra

    def current(self, alias: str) -> Version | None:
        return ask_to_write(
            self._target.key, self._target.name, lambda: self._current(alias)
        )

    def _current(self, alias: str) -> Version | None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import (
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        name = self._target.name
        api = HfApi()
        try:
            commit = api.model_info(name, revision=alias).sha
            files = api.get_paths_info(name, [WEIGHTS], revision=alias)
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            # To the library, a wrong token is a missing repository.
            if error.response.status_code == UNAUTHORIZED:
                raise
            return None
        large_file = getattr(files[0], "lfs", None) if files else None
        digest = None if large_file is None else large_file.sha256
        url = f"{api.endpoint}/{name}/tree/{alias}"
        return Version(name, str(commit), digest, url)

    def register(self, adapter: Path, lineage: Lineage, alias: str) -> Version:
        extra = self._make_extra(lineage)
        # Without the config, which may hold prompts and paths: the card has the recipe.
        shown = {name: value for name, value in lineage.items() if name != "config"}
        text = json.dumps(json_safe(shown), indent=2) + "\n"
        files = {**extra.files, LINEAGE: text.encode()}
        extra = Extra(extra.sections, extra.tags, files)
        folder = adapter.parent
        publish_run(folder, self._target, extra)
        uploaded = publish_run(folder, self._target, extra, branch=alias)
        url = f"{uploaded.url}/tree/{alias}"
        return Version(uploaded.repository, uploaded.commit, None, url)
