"""The session that a sweep command asks for, checked before torch and a base model are loaded."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import HydraContext
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf

from finetune.config.schema import RunConfig
from finetune.config.secrets import refuse_secrets_in
from finetune.console import summary_line
from finetune.errors import ConfigError, refusal
from finetune.run.learning_rate import resolve_learning_rate
from finetune.run.resources import shared_resources
from sweeps.space.settings import StudySettings
from sweeps.space.space import Point, Space
from sweeps.study.errors import KEY
from sweeps.study.session import Session
from sweeps.study.storage import check_address
from sweeps.study.study import EngineChoice

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Draft:
    """A checked session, before the study is opened and an engine is chosen."""

    session: Session
    points: list[tuple[str, Point]]
    """Role (baseline, start, grid) and point of the first trials."""

    @property
    def total(self) -> int:
        """Number of trials that the study shall hold; a grid has no more than its points."""
        settings = self.session.settings
        return min(settings.n_trials, len(self.points)) if settings.is_grid else settings.n_trials

    @property
    def is_whole_grid(self) -> bool:
        """Whether the study's trials are all points of a grid."""
        return self.session.settings.is_grid and self.total == len(self.points)


def draft_session(
    config: DictConfig,
    context: HydraContext,
    values: Mapping[str, Any],
    arguments: list[str],
) -> Draft:
    """Check a sweep command: its settings, its space, its config, and the database's address.

    Args:
        config: the sweep's config.
        context: Hydra's context.
        values: the arguments of the sweeper, `hydra.sweeper` with its interpolations resolved.
        arguments: overrides of the command line.

    Raises:
        ConfigError: for the first value that is not allowed.
    """
    began = time.time()
    plain = _plain_values(values)
    params = _search_params(config, values)
    settings = _check_settings(config, plain, params)
    space = Space.parse(params, arguments)
    if not space.distributions and settings.custom_search_space is None:
        raise ConfigError(
            "nothing is searched: give search=lora (or another space), "
            "or sweeps as lora.r=choice(8,16)"
        )
    composed = context.config_loader.load_sweep_config(config, space.fixed_texts)
    HydraConfig.instance().set_config(composed)
    common = _check_run_config(settings, composed)
    # The number that `auto` stands for, so that the baseline has it.
    composed.dataset.limit = common.dataset.limit
    check_address(plain["storage"], settings.n_jobs or 1)
    common = resolve_learning_rate(common, shared_resources)
    OmegaConf.update(composed, "optimizer.learning_rate", common.optimizer.learning_rate)
    space, points = _first_points(settings, space.scaled(composed), composed, common.seed)
    session = Session(
        folder=_study_folder(config, values, settings.study_name),
        address=plain["storage"],
        settings=settings,
        space=space,
        config=config,
        hydra_context=context,
        common=common,
        deadline=None if settings.timeout is None else began + settings.timeout,
        engine=EngineChoice(common.trainer.engine, slots=1),
    )
    return Draft(session, points)


def _plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for key, value in values.items():
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True, enum_to_str=True)
        plain[key] = value
    return plain


def _search_params(config: DictConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `hydra.sweeper.params`, or else those of the chosen search space."""
    params = values.get("params")
    if params is None:
        params = OmegaConf.select(config, "search.params")
    if params is None:
        return {}
    plain = OmegaConf.to_container(params, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _check_settings(
    config: DictConfig, plain: Mapping[str, Any], params: dict[str, Any]
) -> StudySettings:
    """Check the settings; they keep the storage's address unresolved, without secrets."""
    written = OmegaConf.to_container(config.hydra.sweeper, resolve=False)
    assert isinstance(written, dict)
    refuse_secrets_in(f"{KEY}={written['storage']}")
    study_name = plain.get("study_name") or time.strftime("%Y-%m-%d_%H-%M-%S")
    checked = {
        **plain,
        "study_name": study_name,
        "storage": written["storage"],
        "params": params,
    }
    return StudySettings.from_sweeper(checked)


def _check_run_config(settings: StudySettings, composed: DictConfig) -> RunConfig:
    """Check the run's config, and that its objectives suit a study."""
    config = RunConfig.from_hydra(composed)
    if not config.objectives:
        raise ConfigError(
            f"objective={config.objective}: there are no held-out rows to search by; "
            "give dataset.eval_fraction above 0, or dataset.eval_path"
        )
    for name, direction in zip(config.objectives, settings.directions, strict=False):
        if name == "eval/accuracy" and direction == "minimize":
            reason = f"{name} is better the larger it is: maximize"
            raise refusal("hydra.sweeper.direction", direction, reason)
    count = len(config.objectives)
    if count != len(settings.directions):
        names = ", ".join(config.objectives)
        reason = f"must be one for each objective ({count}: {names})"
        raise ConfigError(f"hydra.sweeper.direction={settings.direction}: {reason}")
    return config


def _study_folder(config: DictConfig, values: Mapping[str, Any], study_name: str) -> Path:
    """Return the study's folder, `hydra.sweep.dir`.

    Its last part is the study's name, which interpolates to None where `study_name` is null.
    """
    folder = Path(config.hydra.sweep.dir).absolute()
    if values.get("study_name") is None and folder.name == "None":
        return folder.with_name(study_name)
    return folder


def _first_points(
    settings: StudySettings, space: Space, composed: DictConfig, seed: int
) -> tuple[Space, list[tuple[str, Point]]]:
    """Return the points of the first trials, and a space that contains them.

    They are the config's own values (the baseline), the user's points, and a grid's points.
    """
    # Before the baseline widens the space: its values are not those of the user's grid.
    grid = space.grid(seed) if settings.is_grid else []
    points: list[tuple[str, Point]] = []
    if settings.baseline and space.distributions:
        baseline = space.point_of(composed)
        if baseline is None:
            log.info("no baseline: the config has no value of its own for what is searched")
        else:
            space, lines = space.widened(baseline)
            for line in lines:
                log.info("%s", line)
            points.append(("baseline", baseline))
    for point in settings.start:
        space.require("hydra.sweeper.start", point)
        points.append(("start", point))
    chosen = [point for _, point in points]
    points += [("grid", point) for point in grid if point not in chosen]
    return space, points


def check_space(session: Session) -> list[RunConfig]:
    """Check sampler, pruner, the user's function, and configs at the ends of the space.

    Returns:
        The configs at the extremes of the space.

    Raises:
        ConfigError: no trial of the study could run.
    """
    _require_makes("sampler", lambda: session.sampler(0))
    _require_makes("pruner", session.pruner)
    _check_function(session.settings.custom_search_space)
    configs = []
    for point in session.space.extremes():
        composed = session.compose(0, session.space.overrides(point))
        HydraConfig.instance().set_config(composed)
        configs.append(session.check(RunConfig.from_hydra(composed)))
    return configs


def _require_makes(key: str, make: Callable[[], object]) -> None:
    try:
        make()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"hydra.sweeper.{key}: {summary_line(error)}") from error


def _check_function(path: str | None) -> None:
    if not path:
        return
    try:
        get_method(path)
    except Exception as error:
        reason = f"no such function ({summary_line(error)})"
        raise refusal("hydra.sweeper.custom_search_space", path, reason) from error
