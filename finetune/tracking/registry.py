"""Registries of adapters: named models with versions, of which an alias marks the deployed one."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import refusal

ALIAS = re.compile(r"(?a)[A-Za-z][\w-]{0,63}")
"""Without `.`, which MLflow refuses, and which a branch of the hub can't have everywhere."""

RESERVED_ALIASES = re.compile(r"(?i)latest|main|head|v\d+")
"""Names with a meaning in W&B, on the hub, and in MLflow, for which `V1` is a version too."""

DIGEST = "adapter_sha256"
"""Entry of a lineage: the SHA-256 of the adapter's weights, by which versions are told apart."""

Lineage = Mapping[str, Any]
"""Where an adapter comes from, and why it was promoted, as nested plain values."""


@dataclass(frozen=True)
class Version:
    """A registered version."""

    name: str
    """The registered model, artifact or repository."""
    version: str
    digest: str | None
    """The SHA-256 of the adapter's weights; None: whoever registered it has not said."""
    url: str | None = None
    """Its page on a server; None: it has none."""
    command: str | None = None
    """The command that shows a registry on this machine; None: a server has it."""


class Registry(ABC):
    """A place where adapters are registered under a name."""

    title: str
    """For messages."""

    @abstractmethod
    def current(self, alias: str) -> Version | None:
        """Return the version that has an alias; None: none has it.

        Raises:
            ConfigError: The registry can't be reached, or refuses.
        """

    @abstractmethod
    def register(self, adapter: Path, lineage: Lineage, alias: str) -> Version:
        """Register an adapter with its lineage, and give it an alias, which others lose.

        The alias moves last, so that a failure leaves it where it was. What is registered already
        is not registered again.

        Raises:
            ConfigError: The registry can't be reached, or refuses.
        """


def require_alias(alias: str) -> None:
    """Refuse an alias that not every registry takes."""
    if ALIAS.fullmatch(alias) and not RESERVED_ALIASES.fullmatch(alias):
        return
    allowed = (
        "must be a letter and then letters, digits, - and _ (64 at most, no .), and not latest, "
        "main, head or a version as v1, in any case"
    )
    raise refusal("--alias", alias, allowed)
