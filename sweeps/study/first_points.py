"""The points of a study's first trials: the baseline, the user's points, and those of a grid."""

import logging

from omegaconf import DictConfig

from sweeps.space.config_point import config_point
from sweeps.space.custom import extend_baseline
from sweeps.space.distributions import describe
from sweeps.space.points import grid_points
from sweeps.space.settings import StudySettings
from sweeps.space.space import Point, Space

log = logging.getLogger(__name__)


def first_points(
    settings: StudySettings,
    space: Space,
    config: DictConfig,
    composed: DictConfig,
    seed: int,
) -> list[tuple[str, Point]]:
    """Return the points of the first trials.

    They are the config's own values (the baseline), the user's points, and a grid's points.
    """
    points: list[tuple[str, Point]] = []
    if settings.baseline:
        baseline = _baseline(settings, space, config, composed)
        if baseline is not None:
            points.append(("baseline", baseline))
    for point in settings.start:
        space.require("hydra.sweeper.start", point)
        points.append(("start", point))
    chosen = [point for _, point in points]
    for point in grid_points(space, seed) if settings.is_grid else []:
        if point not in chosen:
            points.append(("grid", point))
    return points


def _baseline(
    settings: StudySettings, space: Space, config: DictConfig, composed: DictConfig
) -> Point | None:
    """Return the point of the config's own values, which may lie outside the space."""
    baseline = config_point(space, composed)
    if baseline is None:
        log.info("no baseline: the config has no value of its own for what is searched")
        return None
    if settings.custom_search_space:
        baseline = extend_baseline(
            settings.custom_search_space, config, space, baseline, composed
        )
    for name, value in space.outside(baseline or {}).items():
        distribution = space.distributions.get(name)
        described = describe(distribution) if distribution else "all variants"
        message = (
            "%s=%s: the config's own value lies outside %s; only the baseline has it"
        )
        log.info(message, name, value, described)
    return baseline
