"""A worker: holds one loaded base, and claims trials and gives them slots until none is left.

A worker is the task that a Hydra launcher runs, in this process or in others: it carries all it needs.
"""

import contextlib
import dataclasses
import os
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from hydra.core.hydra_config import HydraConfig
from hydra.types import HydraContext
from hydra.utils import get_method, instantiate
from omegaconf import DictConfig, open_dict
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState

from finetune.cli import brief, quiet_libraries
from finetune.config import ConfigError, RunConfig, refusal
from finetune.progress import Interrupt
from sweeps.pack import Lane, leaving_to_logs, train_together
from sweeps.settings import StudySettings
from sweeps.space import Space, encode
from sweeps.study import Study
from sweeps.trial import Turn, on_its_last_life

PARENT = os.getppid()
"""Whose child this process began as."""


@dataclass(frozen=True)
class Worker:
    """Everything a worker needs, in a form that launchers can send to other processes."""

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

    def __call__(self, composed: DictConfig) -> float:
        """Work until no trial is left; returns the number of trials finished. What a launcher calls."""
        try:
            with leaving_to_logs(beside=os.getpid() != self.process and sys.stderr.isatty()):
                return self._work()
        finally:
            if self.is_orphan:
                os._exit(1)  # nobody is there to be told; waiting for orders would only hold the base's memory

    def _work(self) -> float:
        quiet_libraries(bars=False)
        from finetune.base import take_device

        take_device(HydraConfig.get().job.num)
        study, interrupt = Study(self.folder, self.settings.study_name, self.address), Interrupt()
        alone = train_together(lambda: self._next(study, interrupt, on_its_last_life), 1)
        beside = train_together(
            lambda: self._next(study, interrupt, lambda trial: not on_its_last_life(trial)), self.slots
        )
        return float(alone + beside)

    def _next(self, study: Study, interrupt: Interrupt, wanted: Callable[[FrozenTrial], bool]) -> Lane | None:
        """The next wanted trial, in a slot; None if there is none, or none shall begin."""
        if self.is_over(study):
            return None
        with contextlib.ExitStack() as held:
            claim = held.enter_context(study.claim(wanted))
            if claim is None:
                return None
            turn = Turn(self, study, claim, interrupt)
            return Lane(str(claim.number), turn.take(held.pop_all()), claim.folder.path / "train.log", turn.companions)

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
                raise ConfigError(f"hydra.sweeper.{part}: {brief(error)}") from error
        extender = self.settings.custom_search_space
        if extender:
            try:
                get_method(extender)
            except Exception as error:
                raise refusal(
                    "hydra.sweeper.custom_search_space", extender, f"no such function ({brief(error)})"
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
        allowed = ("optuna.pruners.*", "sweeps.halving.*")
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
