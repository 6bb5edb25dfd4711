"""The keys of `hydra.sweeper`, checked once when a study begins."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from finetune.config.convert import build
from finetune.config.flatten import flatten
from finetune.config.paths import PLAIN_NAME, is_plain_name
from finetune.config.schema import Section
from finetune.errors import ConfigError
from sweeps.space.space import encode

Direction = Literal["minimize", "maximize"]


@dataclass(frozen=True, kw_only=True)
class StudySettings(Section):
    """One study, as the user asked for it."""

    section: ClassVar[str] = "hydra.sweeper"
    study_name: str
    storage: str | None
    n_trials: int
    n_jobs: int | None
    slots: int | Literal["auto"]
    direction: Direction | list[Direction]
    max_failure_rate: float
    params: dict[str, Any]
    custom_search_space: str | None
    baseline: bool
    start: list[dict[str, Any]]
    timeout: float | None
    keep_adapters: int
    confirm: int
    allow_change: bool
    sampler: dict[str, Any]
    pruner: dict[str, Any]

    def __post_init__(self) -> None:
        self.require("study_name", is_plain_name(self.study_name), PLAIN_NAME)
        self.require("n_trials", self.n_trials >= 1, "must be at least 1")
        self.require("n_jobs", self.n_jobs is None or self.n_jobs >= 1, "must be at least 1, or null: one for each GPU")
        self.require("slots", self.slots == "auto" or int(self.slots) >= 1, "must be at least 1, or auto: by memory")
        self.require("direction", bool(self.direction), "must be minimize or maximize, or a list of them")
        self.require("max_failure_rate", 0 <= self.max_failure_rate <= 1, "must be a share of the trials, from 0 to 1")
        self.require("timeout", self.timeout is None or self.timeout > 0, "must be above 0 seconds, or null")
        self.require("keep_adapters", self.keep_adapters >= 1, "must be at least 1")
        self.require("confirm", self.confirm >= 0, "must be a number of seeds; 0: none")
        self.require("confirm", not self.confirm or len(self.directions) == 1, "needs one objective; 0: none")

    @classmethod
    def from_sweeper(cls, values: Mapping[str, Any]) -> "StudySettings":
        """Check plain values. Raises ConfigError for the first thing wrong with them."""
        start = values.get("start")
        points = [start] if isinstance(start, Mapping) else start
        if not isinstance(points, list) or not all(isinstance(point, Mapping) for point in points):
            raise ConfigError(f"hydra.sweeper.start={start}: must be a list of points, as [{{lora.r: 8}}]")
        return build(cls, "hydra.sweeper", {**values, "start": [_encoded(point) for point in points]})

    @property
    def directions(self) -> list[Direction]:
        """One for each objective."""
        return [self.direction] if isinstance(self.direction, str) else list(self.direction)

    @property
    def is_grid(self) -> bool:
        """Whether every point of the space shall be tried."""
        return bool(re.search(r"\bGridSampler$", str(self.sampler.get("_target_"))))


def _encoded(point: Mapping[str, Any]) -> dict[str, Any]:
    """A point as the space has its values."""
    return {name: encode(value) for name, value in flatten(dict(point)).items()}
