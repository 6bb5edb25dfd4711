"""The Hydra sweeper `hydra/sweeper=optuna`: opens or resumes a study, sends workers through the launcher, concludes.

Registered as a plugin by the package's entry point, so it is imported whenever Hydra starts: all that is heavy
is imported when a sweep begins.
"""

import contextlib
import dataclasses
import logging
import os
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.plugins.sweeper import Sweeper

if TYPE_CHECKING:
    from hydra.plugins.launcher import Launcher
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

    from finetune.config.schema import RunConfig
    from sweeps.space.settings import StudySettings
    from sweeps.space.space import Point, Space
    from sweeps.study.session import Session
    from sweeps.study.study import Study


log = logging.getLogger(__name__)


RELAUNCHES = 25
"""How often workers are sent again after one of them was killed."""


class StudySweeper(Sweeper):
    """Searches by Optuna; the keys are those of `conf/hydra/sweeper/optuna.yaml`."""

    def __init__(self, **values: Any) -> None:
        self._values = values

    def setup(self, *, hydra_context: "HydraContext", task_function: "TaskFunction", config: "DictConfig") -> None:
        self._hydra_context, self._config = hydra_context, config

    def sweep(self, arguments: list[str]) -> None:
        """One session of a study: until it holds all its trials, its time is over, or it is interrupted."""
        for chatter in ("hydra", "hydra_plugins"):
            logging.getLogger(chatter).setLevel(logging.WARNING)
        draft, points = self._draft(arguments)
        study, session = self._open(draft)
        settings = session.settings
        total = min(settings.n_trials, len(points)) if settings.is_grid else settings.n_trials
        if _enlist(study, settings, points, total):
            self._work(study, session, total)
        _end(study, session)

    def _draft(self, arguments: list[str]) -> "tuple[Session, list[tuple[str, Point]]]":
        """The session as the config describes it, before an engine is chosen, and the first trials' points."""
        from omegaconf import OmegaConf

        from finetune.errors import ConfigError
        from finetune.run.learning_rate import resolve_learning_rate
        from finetune.run.resources import shared_resources
        from sweeps.space.space import Space
        from sweeps.study.session import Session
        from sweeps.study.storage import check_address

        began = time.time()
        settings, address = self._settings()
        space = Space.parse(self._params(), arguments)
        if not space.distributions and settings.custom_search_space is None:
            raise ConfigError(
                "nothing is searched: give search=lora (or another space), or sweeps as lora.r=choice(8,16)"
            )
        composed = self._compose(space.fixed_texts)
        config = self._check(settings, composed)
        composed.dataset.limit = config.dataset.limit  # the baseline has the number that auto stands for
        check_address(address, settings.n_jobs or 1)
        config = resolve_learning_rate(config, shared_resources)
        OmegaConf.update(composed, "optimizer.learning_rate", config.optimizer.learning_rate)
        space, points = self._points(settings, space.scaled(composed), composed, config.seed)
        session = Session(
            folder=self._folder(settings.study_name),
            address=address,
            settings=settings,
            space=space,
            config=self._config,
            hydra_context=self._hydra_context,
            common=config,
            deadline=None if settings.timeout is None else began + settings.timeout,
            engine=config.trainer.engine,
            slots=1,
        )
        return session, points

    def _open(self, draft: "Session") -> "tuple[Study, Session]":
        """Begin or resume the study once everything is checked; return it and the session with engine and slots."""
        from finetune.console import quiet_libraries
        from finetune.run.resources import shared_resources
        from sweeps.study.storage import check_address
        from sweeps.study.study import Study

        settings, config, space = draft.settings, draft.common, draft.space
        extremes = draft.try_out()
        quiet_libraries(bars=False)
        shared_resources.source(config.model)  # a base that isn't there is said at once, and fetched once
        terms = _terms(config, space, settings)
        check_address(draft.address, self._workers(settings))
        self._say_pruning(settings, config)
        chosen = self._engine(settings, [config, *extremes])
        study = Study.open(draft.folder, settings, draft.address, terms, space.distributions)
        engine, slots, checkpointing = study.settle(*chosen)
        if settings.slots not in ("auto", slots):
            why = "trl trains one trial at a time" if engine == "trl" else "the study keeps those that it began with"
            log.info("hydra.sweeper.slots=%s: %d instead, as %s", settings.slots, slots, why)
        return study, dataclasses.replace(draft, engine=engine, slots=slots, checkpointing=checkpointing)

    def _folder(self, name: str) -> Path:
        """The study's folder, `hydra.sweep.dir`, which is called None where a null `study_name` became the time."""
        folder = Path(self._config.hydra.sweep.dir).absolute()
        return folder.with_name(name) if self._values.get("study_name") is None and folder.name == "None" else folder

    def _settings(self) -> "tuple[StudySettings, str | None]":
        """The checked settings, and the storage's address; what is kept of it is as the user wrote it."""
        from omegaconf import DictConfig, OmegaConf

        from finetune.config.secrets import refuse_secrets_in
        from sweeps.space.settings import StudySettings

        plain: dict[str, Any] = {
            key: OmegaConf.to_container(value, resolve=True, enum_to_str=True) if OmegaConf.is_config(value) else value
            for key, value in self._values.items()
        }
        address: str | None = plain["storage"]
        plain["study_name"] = plain.get("study_name") or time.strftime("%Y-%m-%d_%H-%M-%S")
        node = self._config.hydra.sweeper
        assert isinstance(node, DictConfig)
        written = OmegaConf.to_container(node, resolve=False)
        assert isinstance(written, dict)
        refuse_secrets_in(f"hydra.sweeper.storage={written['storage']}")
        return StudySettings.from_sweeper({**plain, "storage": written["storage"], "params": self._params()}), address

    def _params(self) -> dict[str, Any]:
        """`hydra.sweeper.params` as the stock sweeper has it, else the chosen search space."""
        from omegaconf import OmegaConf

        params = self._values.get("params")
        if params is None:
            params = OmegaConf.select(self._config, "search.params")
        found = OmegaConf.to_container(params, resolve=True) if params is not None else {}
        assert isinstance(found, dict)
        return {str(key): value for key, value in found.items()}

    def _compose(self, overrides: list[str]) -> "DictConfig":
        """The config of a trial, before anything is searched."""
        from hydra.core.hydra_config import HydraConfig

        composed = self._hydra_context.config_loader.load_sweep_config(self._config, overrides)
        HydraConfig.instance().set_config(composed)
        return composed

    def _check(self, settings: "StudySettings", composed: "DictConfig") -> "RunConfig":
        """The run's config, checked as a run does, and that it can be a study's."""
        from finetune.config.schema import RunConfig
        from finetune.errors import ConfigError, refusal

        config = RunConfig.from_hydra(composed)
        if not config.objectives:
            raise ConfigError(
                f"objective={config.objective}: there are no held-out rows to search by; "
                "give dataset.eval_fraction above 0, or dataset.eval_path"
            )
        for name, direction in zip(config.objectives, settings.directions, strict=False):
            if name == "eval/accuracy" and direction == "minimize":
                raise refusal("hydra.sweeper.direction", direction, f"{name} is better the larger it is: maximize")
        wanted, given = len(config.objectives), len(settings.directions)
        if wanted != given:
            raise ConfigError(
                f"hydra.sweeper.direction={settings.direction}: must be one for each objective ({wanted}: "
                f"{', '.join(config.objectives)})"
            )
        return config

    def _workers(self, settings: "StudySettings") -> int:
        if settings.n_jobs is not None:
            return settings.n_jobs
        import torch

        return max(1, torch.cuda.device_count())

    def _engine(self, settings: "StudySettings", configs: "list[RunConfig]") -> tuple[str, int, bool]:
        """One engine for all trials of a study, how many train together, and whether they compute activations twice."""
        from finetune.engine.selection import choose_engine
        from finetune.run.resources import shared_resources
        from sweeps.study.pack import choose_slots, memory_rank

        engines = (choose_engine(config, shared_resources.source(config.model)) for config in configs)
        if "trl" in engines:  # the first that it is for decides, and says why
            return "trl", 1, False
        slots, decided = choose_slots(settings.slots, max(configs, key=memory_rank))
        return "packed", slots, decided.trainer.gradient_checkpointing is True

    def _points(
        self, settings: "StudySettings", space: "Space", composed: "DictConfig", seed: int
    ) -> "tuple[Space, list[tuple[str, Point]]]":
        """What the first trials shall be (the config's own values, the user's points, the grid), and a space for it."""
        grid = space.grid(seed) if settings.is_grid else []
        points: list[tuple[str, Point]] = []
        if settings.baseline and space.distributions:
            own = space.point_of(composed)
            if own is None:
                log.info("no baseline: the config has no value of its own for what is searched")
            else:
                space, lines = space.widened(own)
                for line in lines:
                    log.info("%s", line)
                points.append(("baseline", own))
        for point in settings.start:
            space.require("hydra.sweeper.start", point)
            points.append(("start", point))
        known = [point for _, point in points]
        return space, [*points, *(("grid", point) for point in grid if point not in known)]

    def _say_pruning(self, settings: "StudySettings", config: "RunConfig") -> None:
        if "Nop" in str(settings.pruner.get("_target_")):
            return
        if len(settings.directions) > 1:
            log.info("no pruning: trials with several objectives can't be ranked before their end")
        elif not config.objectives[0].startswith("eval/"):
            log.info("no pruning: %s is not known before a trial's end", config.objectives[0])

    def _work(self, study: "Study", session: "Session", total: int) -> None:
        """Send the workers, again if one was killed, until none has anything left to do."""
        from hydra.core.utils import JobStatus

        from finetune.console import error_line
        from finetune.errors import ConfigError, Interrupted
        from sweeps.space.space import encode
        from sweeps.study.errors import StorageLost
        from sweeps.study.live_table import live_table

        workers = self._workers(session.settings)
        launcher = self._launcher(session, workers)
        place = f"hydra.sweep.dir={encode(str(study.folder))}"
        jobs = [[*session.space.fixed_texts, place, f"hydra.sweep.subdir=workers/{index}"] for index in range(workers)]
        resume = f"the same command with hydra.sweeper.study_name={study.name} goes on"
        interrupted = Interrupted(f"interrupted; {resume}")
        for _ in range(RELAUNCHES):
            try:
                with live_table(study, total), _asking_to_end(session.stop_file, workers):
                    done = launcher.launch(jobs, initial_job_idx=0)
            except KeyboardInterrupt:
                raise interrupted from None
            except Exception as error:
                if not study.orphans():
                    raise
                log.warning("a worker was lost (%s); its trial is taken on", error_line(error))
                continue
            for job in done:
                if isinstance(job._return_value, StorageLost):
                    raise StorageLost(f"{job._return_value}; {resume}")
                if job.status == JobStatus.FAILED:
                    raise interrupted if isinstance(job._return_value, Interrupted) else job._return_value
            if not study.orphans() or session.is_over(study):
                return
        raise ConfigError(f"study {study.name}: workers were lost {RELAUNCHES} times; {resume}")

    def _launcher(self, session: "Session", workers: int) -> "Launcher":
        """The chosen launcher; one of this process's own runs one worker, and for several gives way to joblib's."""
        from hydra.core.plugins import Plugins
        from omegaconf import OmegaConf, open_dict, read_write

        from sweeps.study.worker import Worker

        plain = self._config.copy()
        with read_write(plain), read_write(plain.hydra):
            plain.hydra.sweep.dir = str(session.folder)
        config = plain.copy()
        with read_write(config), read_write(config.hydra), open_dict(config.hydra):
            if str(config.hydra.launcher._target_).endswith(("BasicLauncher", "SlotsLauncher")):
                from hydra._internal.core_plugins.basic_launcher import BasicLauncherConf
                from hydra_plugins.hydra_joblib_launcher.config import JobLibLauncherConf

                config.hydra.launcher = OmegaConf.structured(JobLibLauncherConf if workers > 1 else BasicLauncherConf)
            if str(config.hydra.launcher._target_).endswith("JoblibLauncher"):
                OmegaConf.update(config, "hydra.launcher.n_jobs", workers)
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=self._hydra_context, task_function=Worker(session), config=config
        )
        # Jobs are composed anew, and must come out with the launcher that was asked for.
        launcher.setup(hydra_context=self._hydra_context, task_function=Worker(session), config=plain)
        return launcher


@contextlib.contextmanager
def _asking_to_end(stop_file: Path, workers: int) -> Iterator[None]:
    """Ctrl-C and SIGTERM while workers are in processes of their own: they end cleanly. A second one ends all at once.

    A worker in this process hears them itself. Raises KeyboardInterrupt when the workers have ended.
    """
    if workers == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def hear(number: int, frame: object) -> None:
        if stop_file.exists():
            raise KeyboardInterrupt
        stop_file.touch()

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
        if stop_file.exists():
            raise KeyboardInterrupt
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
        stop_file.unlink(missing_ok=True)


def _terms(config: "RunConfig", space: "Space", settings: "StudySettings") -> dict[str, Any]:
    """What all trials have in common, so that they can be compared: the config without what is searched; the space."""
    from finetune.config.flatten import flatten
    from finetune.run.identity import KEYS_WITHOUT_EFFECT
    from finetune.run.resources import shared_resources

    searched = {name.lstrip("+") for name in space.distributions}
    groups = tuple(name.replace("/", ".") for name in searched if "/" in name or "." not in name)
    values = flatten(config.anchored().to_dict())
    return {
        **{
            key: values[key]
            for key in values
            if key not in searched and not key.startswith((*KEYS_WITHOUT_EFFECT, *groups))
        },
        "objective": config.objective,
        "hydra.sweeper.direction": settings.directions,
        "dataset_fingerprint": shared_resources.rows(config.dataset).fingerprint,
        **{f"space.{name}": what for name, what in space.to_dict().items()},
    }


def _enlist(study: "Study", settings: "StudySettings", points: "list[tuple[str, Point]]", total: int) -> bool:
    """Write down the trials that are still to be done; whether there are any."""
    left = study.enlist(total, points)
    log.info("study %s: %d of %d trials to go, in %s", study.name, max(left, 0), total, os.path.relpath(study.folder))
    if left <= 0:
        done = len(study.finished())
        more = "every point of the grid is tried; another hydra.sweeper.study_name takes another grid"
        is_whole = settings.is_grid and total == len(points)
        more = more if is_whole else f"hydra.sweeper.n_trials={done + total} goes on"
        log.info("study %s is full (%d trials): %s", study.name, done, more)
    return left > 0


def _end(study: "Study", session: "Session") -> None:
    """Confirm the best trials if wanted, and conclude. Raises ConfigError where too many have failed."""
    from optuna.trial import TrialState

    from finetune.errors import ConfigError, Interrupted
    from finetune.run.resources import shared_resources
    from sweeps.answer.conclusion import conclude
    from sweeps.answer.confirm import confirm
    from sweeps.study.session import too_many_failures

    settings, place = session.settings, os.path.relpath(study.folder)
    try:
        study.tidy(settings.keep_adapters)
        if settings.confirm and session.out_of_time:
            log.info("out of time: not confirmed; python -m sweeps confirm %s does", place)
        elif settings.confirm and study.ranked():
            try:
                confirm(study, settings.confirm)
            except ConfigError as error:
                log.warning("not confirmed: %s", error)
        conclude(study, shared_resources, session.common.tracker)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; python -m sweeps best {shlex.quote(place)} takes the winner") from None
    if too_many_failures(study, settings) or (study.trials(TrialState.FAIL) and not study.ranked()):
        raise ConfigError(_why_failed(study, settings))


def _why_failed(study: "Study", settings: "StudySettings") -> str:
    """What to say of a study that ends without an answer, or with too many failures."""
    from optuna.trial import TrialState

    failed = study.trials(TrialState.FAIL)
    last = failed[-1]
    many = f"{len(failed)} of {len(study.finished())} trials failed"
    rate = f"hydra.sweeper.max_failure_rate={settings.max_failure_rate}"
    return f"{rate}: {many}; trial {last.number}: {last.user_attrs.get('error')}"
