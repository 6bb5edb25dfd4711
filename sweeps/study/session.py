"""A session of a study: what its workers and trials share while the study's command runs."""

import dataclasses
import os
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from hydra.core.hydra_config import HydraConfig
from hydra.types import HydraContext
from hydra.utils import get_method, instantiate
from omegaconf import DictConfig, open_dict
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import TrialState

from finetune.config.schema import RunConfig
from finetune.console import summary_line
from finetune.errors import ConfigError, refusal
from sweeps.space.settings import StudySettings
from sweeps.space.space import Space, encode
from sweeps.study.study import Study

PARENT = os.getppid()
"""Whose child this process began as."""


@dataclass(frozen=True)
class Session:
    """What all workers of a session share, in a form that launchers can send to other processes."""

    folder: Path
    address: str | None
    settings: StudySettings
    space: Space
    config: DictConfig
    """The sweep's config, from which trials' are composed."""
    hydra_context: HydraContext
    common: RunConfig
    """The config's own values, which all trials have but for what is searched."""
    deadline: float | None
    """Seconds since the epoch, after which no trial begins and those that run end."""
    engine: str
    """Of all trials."""
    slots: int
    """How many of them train together in this process."""
    checkpointing: bool = False
    """Whether they compute activations twice, where the config leaves that open."""
    process: int = field(default_factory=os.getpid)
    """The sweeper's own."""

    def try_out(self) -> list[RunConfig]:
        """Configs of the space's extremes.

        Refuses before the study begins what no trial could do: wrong keys and values in the space, wrong parts.
        """
        for part, make in (("sampler", lambda: self.sampler(0)), ("pruner", self.pruner)):
            try:
                make()
            except ConfigError:
                raise
            except Exception as error:
                raise ConfigError(f"hydra.sweeper.{part}: {summary_line(error)}") from error
        extender = self.settings.custom_search_space
        if extender:
            try:
                get_method(extender)
            except Exception as error:
                raise refusal(
                    "hydra.sweeper.custom_search_space", extender, f"no such function ({summary_line(error)})"
                ) from error
        configs = []
        for point in self.space.extremes():
            composed = self.compose(0, self.space.overrides(point))
            HydraConfig.instance().set_config(composed)
            configs.append(self.check(RunConfig.from_hydra(composed)))
        return configs

    def check(self, config: RunConfig) -> RunConfig:
        """Hold a trial's config to what all trials of a study share, however it was changed."""
        mine, common = (dataclasses.replace(one.dataset, limit=None) for one in (config, self.common))
        for key, value in dataclasses.asdict(mine).items():
            if value != getattr(common, key):
                raise refusal(f"dataset.{key}", value, "all trials of a study are measured on the same rows")
        if config.objectives != self.common.objectives:
            raise refusal("objective", config.objective, "all trials of a study have the same")
        return config

    @property
    def common_overrides(self) -> list[str]:
        """What the study has decided for all its trials."""
        key = "trainer.gradient_checkpointing"
        is_open = self.common.trainer.gradient_checkpointing == "auto" and key not in self.space.distributions
        decided = [f"{key}={str(self.checkpointing).lower()}"] if is_open else []
        return [f"trainer.engine={self.engine}", *decided]

    def compose(self, number: int, overrides: list[str]) -> DictConfig:
        """A trial's whole config, as Hydra composes a job's."""
        places = [f"hydra.sweep.dir={encode(str(self.folder))}", f"hydra.sweep.subdir=trials/{number}"]
        config = self.hydra_context.config_loader.load_sweep_config(self.config, [*overrides, *places])
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = str(number), number
        return config

    @property
    def out_of_time(self) -> bool:
        """Whether the study's time is over."""
        return self.deadline is not None and time.time() >= self.deadline

    @property
    def stop_file(self) -> Path:
        """By this the sweeper asks workers in other processes to end cleanly."""
        return self.folder / f".stop-{self.process}"

    @property
    def is_orphan(self) -> bool:
        """Whether the sweeper, whose child this process is, was killed."""
        return self.process == PARENT and os.getppid() != PARENT

    @property
    def asked_to_end(self) -> bool:
        """Whether the session was interrupted, or its sweeper killed."""
        return self.stop_file.exists() or self.is_orphan

    def is_over(self, study: Study) -> bool:
        """Whether no further trial shall begin: the session or its time is over, or too many have failed."""
        return self.asked_to_end or self.out_of_time or too_many_failures(study, self.settings)

    def pruner(self) -> BasePruner:
        """The study's pruner."""
        if len(self.settings.directions) > 1:
            return optuna.pruners.NopPruner()
        allowed = ("optuna.pruners.*", "sweeps.space.pruners.*")
        pruner: BasePruner = instantiate(self.settings.pruner, _execution_whitelist_=allowed)
        return pruner

    def sampler(self, number: int) -> BaseSampler:
        """The sampler of one trial, seeded by the study's seed and the trial's number.

        A sampler seeded once would repeat its suggestions after each resume. QMC's points are counted in the
        storage instead, and make one sequence only under one seed.
        """
        if self.settings.is_grid:
            return RandomSampler(self.common.seed)
        arguments = dict(self.settings.sampler)
        own = arguments.get("seed")
        if own is not None and not isinstance(own, int):
            raise refusal("hydra.sweeper.sampler.seed", own, "must be a whole number, or null: the run's seed")
        seed = self.common.seed if own is None else own
        if not str(arguments["_target_"]).endswith("QMCSampler"):
            seed = zlib.crc32(f"{seed} {number}".encode())
        sampler: BaseSampler = instantiate(
            {**arguments, "seed": seed},
            _execution_whitelist_=("hydra_plugins.hydra_optuna_sweeper.*", "optuna.samplers.*"),
        )
        return sampler


def too_many_failures(study: Study, settings: StudySettings) -> bool:
    """Whether more of the finished trials have failed than may; the first few do not make a rate."""
    failed = len(study.trials(TrialState.FAIL))
    return failed > settings.max_failure_rate * max(len(study.finished()), 5)
