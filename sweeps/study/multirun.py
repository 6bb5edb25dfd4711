"""The jobs of a plain multirun, trained together in one process."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path

from hydra.core.utils import (
    JobReturn,
    configure_log,
    env_override,
)
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from finetune.config.schema import RunConfig
from finetune.console import error_line, quiet_libraries
from finetune.engine.interrupt import Interrupt
from finetune.engine.steps import RunSteps
from finetune.errors import Interrupted, refusal
from finetune.files.run_folder import discard_multirun
from finetune.job_failures import sweep_error
from finetune.run.job import check_job, job
from finetune.run.resources import shared_resources
from finetune.run.result import Objective
from sweeps.compat import job_error
from sweeps.study.job import hydra_config, require_one_directory, run_as_job
from sweeps.study.logs import RunNameFormatter
from sweeps.study.multirun_folder import describe_values, differing_values
from sweeps.study.pack import PackedRun, train_together

log = logging.getLogger(__name__)


class Multirun:
    """Trains the jobs of a plain multirun.

    Args:
        context: Hydra's context.
        config: the multirun's config.
        slots: number of jobs that train at once; `auto`: as many as fit into memory.
    """

    def __init__(
        self,
        context: HydraContext,
        config: DictConfig,
        slots: int | str,
    ) -> None:
        self._context = context
        self._config = config
        self._slots = slots
        self._interrupt = Interrupt()
        self._returns: dict[int, JobReturn] = {}
        self._descriptions: dict[int, str] = {}
        self._slot_count = 1
        self._checkpointed_bases: list[object] = []
        self._borrows_blocks = False

    def run(
        self, job_overrides: Sequence[Sequence[str]], first_number: int
    ) -> list[JobReturn]:
        """Train all jobs, and return what they returned, in their order.

        Args:
            job_overrides: the command line of each job.
            first_number: the first job's number.

        Raises:
            ConfigError: a job failed; raised when all have ended.
        """
        require_one_directory(self._config)
        differences = differing_values(job_overrides)
        composed = []
        for number, overrides in enumerate(job_overrides, first_number):
            description = describe_values(differences[number - first_number])
            self._descriptions[number] = description
            log.info("job %d: %s", number, description or " ".join(overrides))
            composed.append(self._compose(number, list(overrides)))
        with env_override(_environment(composed)):
            return self._train(composed)

    def _train(self, composed: list[DictConfig]) -> list[JobReturn]:
        self._configure_log()
        # Slots are planned for the valid jobs; the others report by themselves what is wrong.
        valid = []
        for job_config in composed:
            run_config = _check(job_config)
            if run_config is not None:
                valid.append(run_config)
        quiet_libraries(bars=False)
        self._choose_slots(valid, len(composed))
        waiting = iter(composed)

        def next_run() -> PackedRun | None:
            config = next(waiting, None)
            return None if config is None else self._packed_run(config)

        with shared_resources.borrowed_blocks(self._borrows_blocks):
            train_together(next_run, self._slot_count)
        self._raise_failures()
        return [self._returns[number] for number in sorted(self._returns)]

    def _compose(self, number: int, overrides: list[str]) -> DictConfig:
        config = self._context.config_loader.load_sweep_config(self._config, overrides)
        with open_dict(config):
            config.hydra.job.id = str(number)
            config.hydra.job.num = number
        return config

    def _choose_slots(self, valid: list[RunConfig], jobs: int) -> None:
        """Choose the number of slots. Without a valid job, none is planned and no torch loaded."""
        if not valid:
            return
        from sweeps.study.slot_count import choose_job_slots

        choice = choose_job_slots(self._slots, valid)
        self._checkpointed_bases = choice.checkpointed_bases
        self._slot_count = min(choice.count, jobs)
        self._borrows_blocks = choice.borrows_blocks

    def _configure_log(self) -> None:
        """Set up the jobs' logging without its file, because each job has a file of its own.

        Lines on the terminal begin with the job's number.
        """
        settings = deepcopy(self._config.hydra.job_logging)
        with read_write(settings), open_dict(settings):
            if "file" in settings.get("handlers", {}):
                del settings.handlers["file"]
                names = settings.root.handlers
                settings.root.handlers = [name for name in names if name != "file"]
        whitelist = self._context.execution_whitelist
        configure_log(
            settings, self._config.hydra.verbose, execution_whitelist=whitelist
        )
        for handler in logging.getLogger().handlers:
            formatter = handler.formatter or logging.Formatter()
            handler.setFormatter(RunNameFormatter(formatter))

    def _packed_run(self, config: DictConfig) -> PackedRun:
        """Return a job as a run in a slot, which stores the job's return when it ends."""
        number = config.hydra.job.num
        sweep = config.hydra.sweep
        folder = Path(sweep.dir, sweep.subdir)
        packed_with: set[str] = set()

        def task(composed: DictConfig) -> RunSteps[Objective]:
            return job(
                composed,
                description=self._descriptions[number],
                packed_with=packed_with,
                interrupt=self._interrupt,
                slots=self._slot_count,
                checkpointed_bases=self._checkpointed_bases,
            )

        def steps() -> RunSteps[None]:
            job_return = yield from run_as_job(config, self._context, task)
            self._returns[number] = job_return
            error = job_error(job_return)
            # An interrupt ends all jobs; any other error is this job's alone.
            if isinstance(error, Interrupted):
                raise error

        return PackedRun(
            str(number),
            steps(),
            folder / "train.log",
            packed_with,
        )

    def _raise_failures(self) -> None:
        """Log each failed job, and raise the first one's error."""
        errors: dict[int, BaseException] = {}
        for number, job_return in self._returns.items():
            error = job_error(job_return)
            if error is not None:
                errors[number] = error
        for number, error in errors.items():
            log.error("job %d failed: %s", number, error_line(error))
        if errors:
            discard_multirun(Path(self._config.hydra.sweep.dir))
            raise sweep_error(errors)


def _check(composed: DictConfig) -> RunConfig | None:
    """Return a job's checked config; None if it is not valid, which the job itself reports."""
    with suppress(ValueError), hydra_config(composed):
        return check_job(composed)
    return None


def _environment(composed: Sequence[DictConfig]) -> dict[str, str]:
    """Return the environment variables of all jobs, `hydra.job.env_set` with those of `env_copy`.

    Raises:
        ConfigError: jobs differ in them: they train in one process, whose variables they share.
    """
    environment: dict[str, str] = {}
    for job_config in composed:
        with hydra_config(job_config):
            variables = OmegaConf.to_container(
                job_config.hydra.job.env_set, resolve=True
            )
        assert isinstance(variables, dict)
        texts = {str(name): str(value) for name, value in variables.items()}
        if job_config is composed[0]:
            environment = texts
        for name in sorted(texts.keys() | environment.keys()):
            if texts.get(name) != environment.get(name):
                reason = (
                    "jobs that train in one process share its variables; "
                    "hydra/launcher=basic runs them one by one"
                )
                raise refusal(f"hydra.job.env_set.{name}", texts.get(name), reason)
    return environment
