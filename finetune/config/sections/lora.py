"""The LoRA adapter."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from finetune.config.sections.section import Section
from finetune.errors import refusal

NEEDS_DATA = ("eva", "corda", "lora_ga")
"""Initializations from activations or gradients. PEFT itself trains `eva` as plain LoRA then."""

CHOOSES_MATRICES = {
    "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "exclude_modules",
}  # fmt: skip
"""Arguments in `lora.extra` that say which layers have an adapter, and of which rank and alpha."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings(Section):
    """The LoRA adapter."""

    section = "lora"

    r: int
    """Rank: the inner dimension of the matrices A and B."""

    alpha: float
    """The adapter's output is scaled by alpha / r (with `use_rslora`: by alpha / sqrt(r))."""

    dropout: float
    """Probability that an element of the adapter's input is dropped in training, in [0, 1)."""

    target_modules: str | list[str]
    """Layers that get an adapter: `all-linear` (all but the output head, routers and experts), or a
    list of module names."""

    bias: Literal["none", "all", "lora_only"]
    """Which biases are trained as well."""

    use_rslora: bool
    """Whether the scaling is rank-stabilised (arXiv 2312.03732)."""

    use_dora: bool
    """Whether magnitude and direction of a weight are trained apart (DoRA, arXiv 2402.09353)."""

    init_lora_weights: bool | str
    """Initialization, as in peft: true (B is zero), false, gaussian, pissa, olora, …"""

    extra: dict[str, Any]
    """Further arguments of `peft.LoraConfig`."""

    adapter: str | None = None
    """An adapter of the same base, rank, scaling and layers that training goes on from: a run
    folder, or a folder of PEFT's; null: a new one."""
    # The default is for run folders that were written before the key existed.

    def __post_init__(self) -> None:
        self.require("r", self.r >= 1, "must be a whole number of at least 1")
        self.require("alpha", self.alpha > 0, "must be above 0")
        self.require("dropout", 0 <= self.dropout < 1, "must be at least 0 and below 1")
        allowed = "must be all-linear or a list of module names"
        self.require("target_modules", bool(self.target_modules), allowed)
        self._check_patterns()
        self.require("adapter", self.adapter != "", "must be a folder, or null")
        needs_data = str(self.init_lora_weights).startswith(NEEDS_DATA)
        allowed = "is computed from data before training, which neither engine does"
        self.require("init_lora_weights", not needs_data, allowed)
        adds_only = self.init_lora_weights in (True, False, "gaussian")
        allowed = "must be true: lora.adapter has the initial weights"
        self.require("init_lora_weights", adds_only or self.adapter is None, allowed)

    def _check_patterns(self) -> None:
        ranks = self.extra.get("rank_pattern") or {}
        allowed = "must be ranks of at least 1, as {q_proj: 8}"
        if not _are_numbers(ranks, int) or min(ranks.values(), default=1) < 1:
            raise refusal("lora.extra.rank_pattern", ranks, allowed)
        alphas = self.extra.get("alpha_pattern") or {}
        allowed = "must be numbers above 0, as {q_proj: 8}"
        if (
            not _are_numbers(alphas, int | float)
            or min(alphas.values(), default=1) <= 0
        ):
            raise refusal("lora.extra.alpha_pattern", alphas, allowed)
        excluded = self.extra.get("exclude_modules")
        allowed = "must be a list of module names, or a regular expression"
        if excluded is not None and not _are_modules(excluded):
            raise refusal("lora.extra.exclude_modules", excluded, allowed)

    @property
    def leaves_base_unchanged(self) -> bool:
        """Whether training and loading the adapter leave all weights of the base as they are.

        Trained biases and initializations that split off a part of the base's weights do not; an
        argument in `extra` might not.
        """
        adds_only = self.init_lora_weights in (True, False, "gaussian")
        chooses_only = self.extra.keys() <= CHOOSES_MATRICES
        return self.bias == "none" and adds_only and chooses_only

    @property
    def largest_rank(self) -> int:
        """The largest rank of a layer, with `lora.extra.rank_pattern`."""
        ranks: dict[str, int] = self.extra.get("rank_pattern") or {}
        return max(self.r, *ranks.values(), 1)

    @property
    def starts_at_zero(self) -> bool:
        """Whether a new adapter changes nothing yet, because its matrix B is zero."""
        is_fresh = self.adapter is None and self.init_lora_weights is not False
        return self.leaves_base_unchanged and is_fresh

    @property
    def is_computed_from_base(self) -> bool:
        """Whether the adapter's initial weights are computed from the base's dense weights."""
        methods = ("pissa", "orthogonal", "loftq")
        return str(self.init_lora_weights).startswith(methods)


def _are_numbers(pattern: Any, number: Any) -> bool:
    """Whether a pattern is a mapping from texts to numbers of a type."""
    return isinstance(pattern, Mapping) and all(
        isinstance(name, str)
        and isinstance(value, number)
        and not isinstance(value, bool)
        for name, value in pattern.items()
    )


def _are_modules(value: Any) -> bool:
    """Whether a value is a list of texts, or a regular expression."""
    if isinstance(value, list):
        return all(isinstance(name, str) for name in value)
    try:
        re.compile(value)
    except (TypeError, re.error):
        return False
    return True
