"""Check before a study begins that its trials can run: sampler, pruner, and ends of the space."""

from collections.abc import Callable

from hydra.core.hydra_config import HydraConfig

from finetune.config.schema import RunConfig
from finetune.console import summary_line
from finetune.errors import ConfigError
from sweeps.space.points import extreme_points
from sweeps.study.session import Session


def check_space(session: Session) -> list[RunConfig]:
    """Check sampler, pruner, and configs at the ends of the space.

    Args:
        session: the session, before its engine is chosen.

    Returns:
        The configs at the extremes of the space.

    Raises:
        ConfigError: no trial of the study could run.
    """
    _require_makes("sampler", lambda: session.sampler(0))
    _require_makes("pruner", lambda: session.pruner)
    configs = []
    for point in extreme_points(session.space):
        overrides = session.space.overrides(point)
        composed = session.compose(0, overrides)
        # For the interpolations `${hydra:…}` in the config.
        HydraConfig.instance().set_config(composed)
        config = RunConfig.from_hydra(composed)
        if config.trainer.extra.get("optim_args"):
            _check_arguments(config)
        configs.append(session.check(config))
    return configs


def _check_arguments(config: RunConfig) -> None:
    # Late: it imports PyTorch.
    from finetune.engine.optimizer_check import check_arguments

    check_arguments(config)


def _require_makes(key: str, make: Callable[[], object]) -> None:
    """Refuse a sampler or pruner that can't be made from its settings."""
    try:
        make()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"hydra.sweeper.{key}: {summary_line(error)}") from error
