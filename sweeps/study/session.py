"""A session of a study: what its workers share while one sweep command runs."""

import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import TrialState

from finetune.config.plain_values import resolve_study_eval_steps
from finetune.config.schema import RunConfig
from finetune.errors import ConfigError, refusal
from finetune.run.spreading import spread_over
from sweeps.space.encoding import encode
from sweeps.space.overrides import SEED_REASON
from sweeps.space.samplers import make_pruner, make_sampler
from sweeps.space.settings import StudySettings
from sweeps.space.space import Space
from sweeps.study.composition import Composer
from sweeps.study.engine_choice import EngineChoice
from sweeps.study.final_time import reserved_seconds
from sweeps.study.storage import resolve_address
from sweeps.study.study import Study
from sweeps.study.sweeper_process import SweeperProcess

MIN_FINISHED = 5
"""Fewer finished trials than this do not make a failure rate."""


@dataclass(frozen=True)
class Session:
    """What all workers of a session share. Launchers pickle it for other processes."""

    folder: Path
    """The study's folder."""
    settings: StudySettings
    space: Space
    config: DictConfig
    """The sweep's config, from which each trial's config is composed."""
    hydra_context: HydraContext
    common: RunConfig
    """The config's own values; a trial differs from it only in what is searched."""
    deadline: float | None
    """Unix time in seconds at which the session shall have its answer."""
    engine: EngineChoice
    has_automatic_rungs: bool = False
    """Whether `trainer.eval_steps=auto` leaves the rungs to the study."""
    end_rule: Callable[[Study], str | None] | None = None
    """Says after each trial why the study ends before it has all; None: it does not."""
    gpus: tuple[str, ...] = ()
    """The GPUs that the sweep command sees, as CUDA_VISIBLE_DEVICES names them."""
    sweeper: SweeperProcess = field(default_factory=SweeperProcess)
    """The process of the sweep command."""

    @property
    def address(self) -> str | None:
        """The database's address; None: the journal.

        Not a field: launchers that pickle a session to a file would write its secrets there.
        """
        return resolve_address(self.settings.storage)

    def compose(self, number: int, overrides: list[str]) -> DictConfig:
        """Compose a trial's config, as Hydra composes a job's.

        Args:
            number: the trial's number.
            overrides: the trial's command line.
        """
        folders = [
            f"hydra.sweep.dir={encode(str(self.folder))}",
            f"hydra.sweep.subdir=trials/{number}",
        ]
        config = self._composer.compose([*overrides, *folders])
        # Hydra's launchers set both, and composing leaves them missing.
        with open_dict(config):
            config.hydra.job.id = str(number)
            config.hydra.job.num = number
        resolve_study_eval_steps(config, self.common.trainer.eval_steps)
        return config

    @functools.cached_property
    def _composer(self) -> Composer:
        return Composer(self.hydra_context.config_loader, self.config)

    @property
    def common_overrides(self) -> list[str]:
        """Overrides that hold the study's engine, for all its trials."""
        overrides = [f"trainer.engine={self.engine.name}"]
        key = "trainer.gradient_checkpointing"
        is_searched = key in self.space.config_keys
        # `auto` could mean something else for each trial: the study has decided it for all.
        if self.common.trainer.gradient_checkpointing == "auto" and not is_searched:
            overrides.append(f"{key}={str(self.engine.checkpointing).lower()}")
        gpus = spread_over(self.common, self.settings.gpus_per_worker).trainer.gpus
        if gpus != self.common.trainer.gpus:
            overrides.append(f"trainer.gpus={gpus}")
        return overrides

    def check(self, config: RunConfig) -> RunConfig:
        """Return a trial's config if it shares rows and objective with the other trials.

        Args:
            config: the trial's config.

        Raises:
            ConfigError: a searched config group, or the user's function, has changed them.
        """
        # Trials may train on more or fewer rows; they are evaluated on the same ones.
        dataset = dataclasses.replace(config.dataset, limit=None)
        common_dataset = dataclasses.replace(self.common.dataset, limit=None)
        common_values = dataclasses.asdict(common_dataset)
        for key, value in dataclasses.asdict(dataset).items():
            if value != common_values[key]:
                reason = "all trials of a study are measured on the same rows"
                raise refusal(f"dataset.{key}", value, reason)
        if config.seed != self.common.seed:
            raise ConfigError(f"seed={config.seed}: {SEED_REASON}")
        if config.objectives != self.common.objectives:
            reason = "all trials of a study have the same"
            raise refusal("objective", config.objective, reason)
        return config

    @functools.cached_property
    def pruner(self) -> BasePruner:
        """The study's pruner: one for all trials of a worker, because it keeps what it has read."""
        return make_pruner(self.settings)

    def sampler(self, trial_number: int) -> BaseSampler:
        """Make the sampler of one trial."""
        return make_sampler(
            self.settings,
            self.common.seed,
            trial_number,
            has_conditions=bool(self.space.conditions),
        )

    def is_out_of_time(self, study: Study) -> bool:
        """Whether no trial shall begin, and running trials shall be pruned.

        The rest of the time is for the final evaluation.
        """
        timeout = self.settings.timeout
        if self.deadline is None or timeout is None:
            return False
        return time.time() >= self.deadline - reserved_seconds(study, timeout)

    @property
    def stop_file(self) -> Path:
        """The file by which the sweep command asks workers in other processes to end."""
        return self.folder / self.file_prefix("stop")

    def file_prefix(self, purpose: str) -> str:
        """Return the name of a file that belongs to this session, in the study's folder.

        It is the same on all hosts of the session.
        """
        return f".{purpose}-{self.sweeper.host}-{self.sweeper.pid}"

    @property
    def is_orphaned(self) -> bool:
        """Whether the sweep command was killed, as far as this machine shows it."""
        return self.sweeper.is_dead

    @property
    def is_stopping(self) -> bool:
        """Whether workers shall end after their present step: interrupted, or orphaned."""
        return self.stop_file.exists() or self.is_orphaned

    def is_over(self, study: Study) -> bool:
        """Whether no further trial shall begin."""
        return (
            self.is_stopping
            or self.is_out_of_time(study)
            or has_failed_too_often(study, self.settings)
        )


def has_failed_too_often(study: Study, settings: StudySettings) -> bool:
    """Whether more of the finished trials have failed than `max_failure_rate` allows."""
    failures = len(study.trials(TrialState.FAIL))
    finished = max(len(study.finished()), MIN_FINISHED)
    return failures > settings.max_failure_rate * finished
