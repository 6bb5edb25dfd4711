"""The keys of `hydra.sweeper`, checked once when a session of a study begins."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from finetune.config.convert import build
from finetune.config.flatten import flatten
from finetune.config.paths import PLAIN_NAME, is_plain_name
from finetune.config.sections.section import Section
from finetune.errors import refusal
from sweeps.space.constraints import Constraint, parse_constraint
from sweeps.space.encoding import encode

Direction = Literal["minimize", "maximize"]


@dataclass(frozen=True, kw_only=True)
class StudySettings(Section):
    """The keys of `hydra.sweeper`, checked."""

    section: ClassVar[str] = "hydra.sweeper"
    study_name: str
    """Name of the study and its folder; that of an existing study resumes it. null: the time."""
    storage: str | None
    """Address of a database, `postgresql+psycopg2://user@host/name` (a secret in it only as
    `${oc.env:NAME}`); null: a journal file in the study's folder."""
    lost_after: float
    """Seconds without a sign of life after which a machine is lost, with a database: another one
    takes its trials. A machine that can't reach the database gives them up before that."""
    n_trials: int | None
    """Number of trials that the study holds when it is done, over all sessions; null: as many as
    `timeout` or `max_tokens` allow."""
    n_jobs: int | None
    """Number of workers; null: as many as have GPUs of their own, or one on a CPU. With
    `hydra/launcher=slurm`: of all jobs together; null: one job."""
    gpus_per_worker: int
    """GPUs of each worker; over several of them it spreads one base (`trainer.gpus=auto`)."""
    detach: bool
    """With `hydra/launcher=slurm` or `submitit_local`: whether the command returns once its jobs
    are queued. The last job writes the answer."""
    slots: int | Literal["auto"]
    """Number of trials that train together on one worker; auto: by memory, 1 on a CPU."""
    direction: Literal["auto"] | Direction | list[Direction]
    """Whether the objective is minimized or maximized; a list for several objectives; auto: as each
    objective's metric is better."""
    max_failure_rate: float
    """Fraction of the finished trials (at least five) that may fail before the study ends."""
    params: dict[str, Any]
    """Sweep syntax of each searched key; null: the parameters of the group `search`.
    `tag(relative, interval(a, b))` searches multiples of the config's own value."""
    constraints: list[str]
    """Bounds that a trial must keep to win, such as `[adapter/parameters <= 2e6]`: a metric or a
    number of `result.json`, one of <=, >=, < and >, and a number."""
    custom_search_space: str | None
    """Path of a function of (config, trial) that suggests further parameters; null: none."""
    baseline: bool
    """Whether the first trial has the config's own values. It is never pruned."""
    baseline_seeds: int | Literal["auto"]
    """Number of further seeds with which the baseline is trained in slots that no trial needs, to
    show how far equal configs differ; auto: 2, or none with one slot."""
    start: list[dict[str, Any]]
    """Points for the next trials, such as `[{lora.r: 8, lora.alpha: 16}]`."""
    warm_start: list[str]
    """Earlier studies, by name or folder. Their trials inform the sampler where this study could
    have trained them; of a study without such trials the best points are trained again."""
    timeout: float | None
    """Seconds for the whole session, its final evaluation included; null: no limit. When only the
    time for that is left, no trial begins, and running trials are pruned."""
    stop_when: Literal["no_gain"] | None
    """no_gain: no further trial begins once at least 20 are measured and simulations say that as
    many more would hardly help; null: the study goes on to `n_trials`."""
    max_tokens: int | None
    """Training tokens of all trials together, over all sessions, from which on no trial begins;
    running trials go on to their end. null: no limit."""
    keep_adapters: int
    """Number of the best trials whose adapters and checkpoints stay on disk."""
    confirm: int
    """Number of further seeds with which the best trials and the baseline are trained again at the
    end; 0: none."""
    allow_change: bool
    """Whether to resume a study although its config or its space has changed."""
    sampler: dict[str, Any]
    """Optuna's sampler and its arguments: the group `hydra/sweeper/sampler`."""
    pruner: dict[str, Any]
    """The pruner and its arguments: the group `hydra/sweeper/pruner`."""

    def __post_init__(self) -> None:
        self._check_trials_and_workers()
        self.require(
            "direction",
            bool(self.direction),
            "must be auto, minimize or maximize, or a list of the last two",
        )
        is_rate = 0 <= self.max_failure_rate <= 1
        self.require(
            "max_failure_rate", is_rate, "must be a share of the trials, from 0 to 1"
        )
        self._check_stop_when()
        self._check_lost_after()
        for text in self.constraints:
            parse_constraint(text)
        self._check_budget()
        self.require("keep_adapters", self.keep_adapters >= 1, "must be at least 1")
        self.require("confirm", self.confirm >= 0, "must be a number of seeds; 0: none")
        can_confirm = not self.confirm or self._may_have_one_objective
        self.require("confirm", can_confirm, "needs one objective; 0: none")
        has_seeds = self.baseline_seeds == "auto" or int(self.baseline_seeds) >= 0
        self.require(
            "baseline_seeds", has_seeds, "must be a number of seeds, or auto; 0: none"
        )

    def _check_stop_when(self) -> None:
        if self.stop_when is None:
            return
        self.require(
            "stop_when", self._may_have_one_objective, "needs one objective; null: none"
        )
        samples = not self.is_grid
        self.require("stop_when", samples, "a grid tries every point; null: none")

    def _check_trials_and_workers(self) -> None:
        self.require("study_name", is_plain_name(self.study_name), PLAIN_NAME)
        has_trials = self.n_trials is None or self.n_trials >= 1
        self.require("n_trials", has_trials, "must be at least 1, or null")
        has_workers = self.n_jobs is None or self.n_jobs >= 1
        self.require(
            "n_jobs", has_workers, "must be at least 1, or null: one for each GPU"
        )
        has_gpus = self.gpus_per_worker >= 1
        self.require("gpus_per_worker", has_gpus, "must be at least 1")
        has_slots = self.slots == "auto" or int(self.slots) >= 1
        self.require("slots", has_slots, "must be at least 1, or auto: by memory")

    def _check_lost_after(self) -> None:
        # A heartbeat may take as long as a connection is tried for.
        allowed = "must be at least 10 seconds"
        self.require("lost_after", self.lost_after >= 10, allowed)

    def _check_budget(self) -> None:
        has_time = self.timeout is None or self.timeout > 0
        self.require("timeout", has_time, "must be above 0 seconds, or null")
        has_tokens = self.max_tokens is None or self.max_tokens > 0
        self.require("max_tokens", has_tokens, "must be above 0 tokens, or null")
        if self.n_trials is not None:
            return
        has_budget = self.timeout is not None or self.max_tokens is not None
        self.require(
            "n_trials",
            has_budget,
            "needs a budget: hydra.sweeper.timeout or hydra.sweeper.max_tokens",
        )
        # Trials that fail at once spend no tokens: such a study would never end.
        self.require(
            "max_failure_rate",
            self.max_failure_rate < 1,
            "must be below 1 with hydra.sweeper.n_trials=null",
        )

    @classmethod
    def from_sweeper(cls, values: Mapping[str, Any]) -> "StudySettings":
        """Check the plain values of `hydra.sweeper`.

        Args:
            values: the keys and their values, without OmegaConf's types.

        Raises:
            ConfigError: for the first value that is not allowed.
        """
        points = _start_points(values.get("start"))
        warm_start = values.get("warm_start")
        # A single study without the brackets.
        names = [warm_start] if isinstance(warm_start, str) else warm_start
        checked = {**values, "start": points, "warm_start": names}
        return build(cls, "hydra.sweeper", checked)

    @property
    def _may_have_one_objective(self) -> bool:
        """Whether there is one direction, or none yet: it is checked again once it is resolved."""
        return self.direction == "auto" or len(self.directions) == 1

    @property
    def directions(self) -> list[Direction]:
        """One direction for each objective; `auto` is resolved by then."""
        if isinstance(self.direction, list):
            return list(self.direction)
        assert self.direction != "auto", "resolved where the session is drafted"
        return [self.direction]

    @property
    def parsed_constraints(self) -> list[Constraint]:
        """The constraints."""
        return [parse_constraint(text) for text in self.constraints]

    @property
    def is_grid(self) -> bool:
        """Whether the study tries every point of the space."""
        target = str(self.sampler.get("_target_"))
        return bool(re.search(r"\bGridSampler$", target))

    @property
    def can_prune(self) -> bool:
        """Whether a pruner is configured, other than Optuna's that never prunes."""
        return "Nop" not in str(self.pruner.get("_target_"))


def _start_points(start: Any) -> list[dict[str, Any]]:
    """Encode the points of `hydra.sweeper.start`, a list of them or a single one."""
    points = [start] if isinstance(start, Mapping) else start
    allowed = "must be a list of points, as [{lora.r: 8}]"
    if not isinstance(points, list):
        raise refusal("hydra.sweeper.start", start, allowed)
    if not all(isinstance(point, Mapping) for point in points):
        raise refusal("hydra.sweeper.start", start, allowed)
    return [_encode_point(point) for point in points]


def _encode_point(point: Mapping[str, Any]) -> dict[str, Any]:
    dotted = flatten(dict(point))
    return {name: encode(value) for name, value in dotted.items()}
