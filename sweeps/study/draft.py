"""The session that a sweep command asks for, checked before torch and a base model are loaded."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from finetune.config.schema import RunConfig
from finetune.errors import ConfigError
from finetune.files.mirror import Mirror
from finetune.metrics.load import check_metrics
from finetune.run.learning_rate import resolve_learning_rate
from finetune.run.resources import shared_resources
from finetune.tracking.open import check_trackers
from sweeps.space.config_point import scaled_space
from sweeps.space.constraints import require_computed, require_names
from sweeps.space.custom import load_function
from sweeps.space.points import point_count
from sweeps.space.settings import StudySettings
from sweeps.space.space import Point, Space
from sweeps.study.command_settings import (
    check_settings,
    plain_values,
    resolve_directions,
    search_params,
)
from sweeps.study.engine_choice import EngineChoice
from sweeps.study.first_points import first_points
from sweeps.study.job import require_one_directory
from sweeps.study.rungs import choose_rungs
from sweeps.study.session import Session
from sweeps.study.storage import check_address, resolve_address
from sweeps.study.warm_start import require_studies

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Draft:
    """A checked session, before the study is opened and an engine is chosen."""

    session: Session
    points: list[tuple[str, Point]]
    """Role (baseline, start, grid) and point of the first trials."""

    def points_with(self, earlier: list[tuple[str, Point]]) -> list[tuple[str, Point]]:
        """Return the points of the first trials with those of earlier studies, a grid's last."""
        grid = [point for point in self.points if point[0] == "grid"]
        first = [point for point in self.points if point[0] != "grid"]
        return [*first, *earlier, *grid]

    def planned_total(self, added: int) -> int | None:
        """Return how many trials the study shall hold; None: as many as the budget allows.

        A space without a continuous parameter has no more than its points, and a baseline outside.

        Args:
            added: number of trials that a user has added by hand, which are not counted.
        """
        n_trials = self.session.settings.n_trials
        if self._point_count is None:
            return n_trials
        # A point that a user has added is not trained twice.
        points = self._point_count - added
        return points if n_trials is None else min(n_trials, points)

    def is_whole_space(self, total: int) -> bool:
        """Whether a number of trials is all points of a space, or of a grid."""
        return self._point_count is not None and total >= self._point_count

    @property
    def _point_count(self) -> int | None:
        """The number of points of a grid, or of a space; None: there is no end of them."""
        settings = self.session.settings
        if settings.is_grid:
            return len(self.points)
        space = self.session.space
        inside = point_count(space)
        if settings.custom_search_space or inside is None:
            return None
        outside = [point for _, point in self.points if space.outside(point)]
        return inside + len(outside)


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
    # The time limit counts from the command's start: checks and downloads are part of it. In Unix
    # time, with which workers in other processes and on other machines compare it.
    began = time.time()
    require_one_directory(config)
    plain = plain_values(values)
    params = search_params(config)
    settings = check_settings(config, plain, params)
    if settings.custom_search_space:
        load_function(settings.custom_search_space)
    space = _parse_space(settings, params, arguments)
    composed = context.config_loader.load_sweep_config(config, space.fixed_texts)
    # For the interpolations `${hydra:…}` in the config.
    HydraConfig.instance().set_config(composed)
    has_automatic_rungs = choose_rungs(composed, space)
    common = _check_run_config(composed)
    metrics = check_metrics(common)
    check_trackers(common.tracker)
    Mirror(common.mirror).check()
    scores = [name for metric in metrics for name in metric.names]
    require_names(settings.parsed_constraints, common.allowed_objectives(scores))
    require_computed(settings.parsed_constraints, common.objectives)
    settings = resolve_directions(settings, common, metrics)
    address = resolve_address(settings.storage)
    # Checked again once torch has counted the GPUs: see `open_study`.
    check_address(address, settings.n_jobs or 1)
    common = _resolve_automatic_values(common, composed)
    # After the learning rate is resolved: relative intervals are multiples of it.
    space = scaled_space(space, composed)
    points = first_points(settings, space, config, composed, common.seed)
    folder = _study_folder(config, values, settings.study_name)
    require_studies(settings, folder)
    deadline = None if settings.timeout is None else began + settings.timeout
    session = Session(
        folder=folder,
        settings=settings,
        space=space,
        config=config,
        hydra_context=context,
        common=common,
        deadline=deadline,
        engine=EngineChoice(common.trainer.engine, slots=1),
        has_automatic_rungs=has_automatic_rungs,
    )
    return Draft(session, points)


def _parse_space(
    settings: StudySettings, params: Mapping[str, Any], arguments: list[str]
) -> Space:
    space = Space.parse(params, arguments)
    if not space.distributions and settings.custom_search_space is None:
        raise ConfigError(
            "nothing is searched: give search=lora (or another space), "
            "or sweeps as lora.r=choice(8,16)"
        )
    return space


def _resolve_automatic_values(common: RunConfig, composed: DictConfig) -> RunConfig:
    """Replace values that are chosen by base and data set, so that the baseline has them.

    Args:
        common: the checked config, with the number that `dataset.limit=auto` stands for.
        composed: the config from which the baseline's values are read; it is changed.

    Returns:
        The config with its learning rate.
    """
    resolved = resolve_learning_rate(common, shared_resources)
    composed.dataset.limit = resolved.dataset.limit
    rate = resolved.optimizer.learning_rate
    OmegaConf.update(composed, "optimizer.learning_rate", rate)
    return resolved


def _check_run_config(composed: DictConfig) -> RunConfig:
    """Check the run's config, and that it has an objective."""
    config = RunConfig.from_hydra(composed)
    if not config.objectives:
        raise ConfigError(
            f"objective={config.objective}: there are no held-out rows to search by; "
            "give dataset.eval_fraction above 0, or dataset.eval_path"
        )
    return config


def _study_folder(
    config: DictConfig, values: Mapping[str, Any], study_name: str
) -> Path:
    """Return the study's folder, `hydra.sweep.dir`.

    Its last part is the study's name, which interpolates to None where `study_name` is null.
    """
    folder = Path(config.hydra.sweep.dir).absolute()
    if values.get("study_name") is None and folder.name == "None":
        return folder.with_name(study_name)
    return folder
