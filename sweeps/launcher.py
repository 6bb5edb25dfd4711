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

    from finetune.config.schema import RunConfig
    from finetune.engine.steps import RunSteps
    from finetune.run.result import Objective
    from sweeps.study.pack import PackedRun


log = logging.getLogger(__name__)


class SlotsLauncher(Launcher):
    """Trains so many jobs at once in this process; `auto`: as many as memory has room for."""

    def __init__(self, slots: int | str = "auto") -> None:
        self._slots = slots

    def setup(self, *, hydra_context: "HydraContext", task_function: "TaskFunction", config: "DictConfig") -> None:
        self._hydra_context, self._config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run one job for each list of overrides; one that fails ends no other, and is told of when all have ended."""
        from finetune.console import error_line, quiet_libraries
        from finetune.engine.interrupt import Interrupt
        from finetune.errors import ConfigError, refusal
        from finetune.files.run_folder import discard_multirun
        from sweeps.study.pack import train_together

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
        shared = {"interrupt": interrupt, "slots": slots, "checkpointed_bases": saving}

        def take() -> "PackedRun | None":
            config = next(waiting, None)
            return None if config is None else self._lane(config, done, shared)

        train_together(take, slots)
        failed = {
            number: error_line(job._return_value) for number, job in done.items() if job.status == JobStatus.FAILED
        }
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
        from sweeps.study.pack import choose_slots, memory_rank

        number = self._slots if isinstance(self._slots, int) else 1
        packed = [config for config in sorted(configs, key=memory_rank, reverse=True) if config.trainer.engine != "trl"]
        if not packed:
            return number, []
        from finetune.console import summary_line
        from finetune.engine.selection import reason_unsupported
        from finetune.model.device import take_device
        from finetune.model.loading import read_base_config
        from finetune.run.resources import base_key, shared_resources

        take_device(0)
        known: set[str] = set()
        slots, saving = [], []
        for config in packed:
            key = repr((base_key(config), config.trainer.gradient_checkpointing, config.dataset))
            if key in known:
                continue
            try:
                if reason_unsupported(config, read_base_config(shared_resources.source(config.model), config.model)):
                    continue  # TRL trains it
                own, decided = choose_slots(self._slots, config)
            except Exception as error:
                log.debug("not planned: %s", summary_line(error))
                continue
            known.add(key)
            slots.append(own)
            if config.trainer.gradient_checkpointing == "auto" and decided.trainer.gradient_checkpointing is True:
                saving.append(base_key(decided))
        return min(slots, default=number), saving

    def _configure_log(self) -> None:
        """The jobs' own logging, but for its file: each job's lane has its own. Lines tell whose they are."""
        from omegaconf import open_dict, read_write

        from sweeps.study.pack import NamingFormatter

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
        from finetune.run.job import check_job
        from sweeps.study.job import hydra_config

        with suppress(ValueError), hydra_config(config):
            return check_job(config)
        return None

    def _lane(self, config: "DictConfig", done: dict[int, JobReturn], shared: dict[str, Any]) -> "PackedRun":
        """A job as work in a slot, which leaves its return among those done; `shared` is in all jobs' `Part`."""
        from finetune.errors import Interrupted
        from finetune.run.job import job
        from sweeps.study.job import run_as_job
        from sweeps.study.pack import PackedRun

        packed_with: set[str] = set()
        number, folder = config.hydra.job.num, Path(config.hydra.sweep.dir, config.hydra.sweep.subdir)

        def work() -> "RunSteps[None]":
            def task(composed: "DictConfig") -> "RunSteps[Objective]":
                return job(composed, packed_with=packed_with, **shared)

            done[number] = yield from run_as_job(config, self._hydra_context, task)
            if isinstance(done[number]._return_value, Interrupted):
                raise done[number]._return_value

        return PackedRun(str(number), work(), folder / "train.log", packed_with)
