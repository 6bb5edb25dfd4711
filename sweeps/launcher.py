"""The Hydra launcher `slots`, the default: the jobs of a plain multirun train together on one base.

Registered as a plugin by the package's entry point, so it is imported whenever Hydra starts: all that is heavy
is imported when jobs begin.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides
from hydra.plugins.launcher import Launcher

if TYPE_CHECKING:
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

    from finetune.config import RunConfig
    from finetune.progress import Turns
    from finetune.run import Objective
    from sweeps.pack import Lane

log = logging.getLogger(__name__)


class SlotsLauncher(Launcher):
    """Trains so many jobs at once in this process; `auto`: as many as memory has room for."""

    def __init__(self, slots: int | str = "auto") -> None:
        self._slots = slots

    def setup(self, *, hydra_context: "HydraContext", task_function: "TaskFunction", config: "DictConfig") -> None:
        self._hydra_context, self._config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run one job for each list of overrides; one that fails ends no other, and is told of when all have ended."""
        from finetune.cli import one_line, quiet_libraries
        from finetune.config import ConfigError, refusal
        from finetune.progress import Interrupt
        from finetune.records import discard_multirun
        from sweeps.pack import train_together

        if self._slots != "auto" and not (isinstance(self._slots, int) and self._slots >= 1):
            raise refusal("hydra.launcher.slots", self._slots, "must be at least 1, or auto: by memory")
        configs = [
            self._compose(number, list(overrides)) for number, overrides in enumerate(job_overrides, initial_job_idx)
        ]
        self._configure_log()
        done: dict[int, JobReturn] = {}
        interrupt, waiting = Interrupt(), iter(configs)
        sound = [config for config in map(self._checked, configs) if config is not None]
        quiet_libraries(bars=False)
        slots, saving = self._choose_slots(sound)
        slots = min(slots, len(configs))
        shared = {"interrupt": interrupt, "slots": slots, "saving": saving}

        def take() -> "Lane | None":
            config = next(waiting, None)
            return None if config is None else self._lane(config, done, shared)

        train_together(take, slots)
        failed = {number: one_line(job._return_value) for number, job in done.items() if job.status == JobStatus.FAILED}
        for number, line in failed.items():
            log.error("job %d failed: %s", number, line)
        if failed:
            discard_multirun(Path(self._config.hydra.sweep.dir))
            first = min(failed)
            raise ConfigError(f"{len(failed)} failed; job {first}: {failed[first]}")
        return [done[number] for number in sorted(done)]

    def _choose_slots(self, configs: "Sequence[RunConfig]") -> tuple[int, list[object]]:
        """How many slots there are, and the bases on which jobs compute activations twice where that is open.

        By the neediest job of each base and data set that can be planned; one that can't says itself what is wrong.
        """
        from sweeps.pack import choose_slots, need

        number = self._slots if isinstance(self._slots, int) else 1
        packed = [config for config in sorted(configs, key=need, reverse=True) if config.trainer.engine != "trl"]
        if not packed:
            return number, []
        from finetune.base import read_base_config, take_device  # and torch, which no job needs that is refused
        from finetune.cli import brief
        from finetune.packed_engine import unsupported
        from finetune.supplies import SHARED, base_key

        take_device(0)
        known: set[str] = set()
        slots, saving = [], []
        for config in packed:
            key = repr((base_key(config), config.trainer.gradient_checkpointing, config.dataset))
            if key in known:
                continue
            try:
                if unsupported(config, read_base_config(SHARED.source(config.model), config.model)):
                    continue  # TRL trains it
                own, decided = choose_slots(self._slots, config)
            except Exception as error:
                log.debug("not planned: %s", brief(error))
                continue
            known.add(key)
            slots.append(own)
            if config.trainer.gradient_checkpointing == "auto" and decided.trainer.gradient_checkpointing is True:
                saving.append(base_key(decided))
        return min(slots, default=number), saving

    def _configure_log(self) -> None:
        """The jobs' own logging, but for its file: each job's lane has its own. Lines tell whose they are."""
        from omegaconf import open_dict, read_write

        from sweeps.pack import NamingFormatter

        settings = deepcopy(self._config.hydra.job_logging)
        with read_write(settings), open_dict(settings):
            if "file" in settings.get("handlers", {}):
                del settings.handlers["file"]
                settings.root.handlers = [name for name in settings.root.handlers if name != "file"]
        whitelist = self._hydra_context.execution_whitelist
        configure_log(settings, self._config.hydra.verbose, execution_whitelist=whitelist)
        for handler in logging.getLogger().handlers:
            handler.setFormatter(NamingFormatter(handler.formatter or logging.Formatter()))

    def _compose(self, number: int, overrides: list[str]) -> "DictConfig":
        from omegaconf import open_dict

        config = self._hydra_context.config_loader.load_sweep_config(self._config, overrides)
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = str(number), number
        log.info("job %d: %s", number, " ".join(filter_overrides(overrides)))
        return config

    def _checked(self, config: "DictConfig") -> "RunConfig | None":
        """A job's config; None where something is wrong with it, which the job says itself."""
        from finetune.__main__ import checked
        from sweeps.job import current

        with suppress(ValueError), current(config):
            return checked(config)
        return None

    def _lane(self, config: "DictConfig", done: dict[int, JobReturn], shared: dict[str, Any]) -> "Lane":
        """A job as work in a slot, which leaves its return among those done; `shared` is in all jobs' `Part`."""
        from finetune.__main__ import job
        from finetune.cli import Interrupted
        from sweeps.job import as_job
        from sweeps.pack import Lane

        companions: set[str] = set()
        number, folder = config.hydra.job.num, Path(config.hydra.sweep.dir, config.hydra.sweep.subdir)

        def work() -> "Turns[None]":
            def task(composed: "DictConfig") -> "Turns[Objective]":
                return job(composed, companions=companions, **shared)

            done[number] = yield from as_job(config, self._hydra_context, task)
            if isinstance(done[number]._return_value, Interrupted):
                raise done[number]._return_value

        return Lane(str(number), work(), folder / "train.log", companions)
