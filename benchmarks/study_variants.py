"""Variants of the default study, as overrides of the project's config, and their composition."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from finetune.config.paths import CONF
from finetune.config.plain_values import STUDY_EVAL_STEPS, resolve_study_eval_steps
from finetune.engine.schedule import evaluation_rungs
from sweeps.space.config_point import config_point, scaled_space
from sweeps.space.settings import StudySettings
from sweeps.space.space import Point, Space

DEFAULT = "default"

PRUNER = "hydra.sweeper.pruner"

VARIANTS: dict[str, dict[str, list[str]]] = {
    "pruner": {
        "no pruning": ["hydra/sweeper/pruner=none"],
        "median": ["hydra/sweeper/pruner=median"],
        "halving by 3, by rank alone": [
            f"{PRUNER}.min_survivors=1",
            f"{PRUNER}.noise_margin=0",
        ],
        "halving by 3, three kept": [f"{PRUNER}.noise_margin=0"],
        "halving by 3, noise": [f"{PRUNER}.min_survivors=1"],
        "halving by 3, a third of the noise, three kept": [
            f"{PRUNER}.noise_margin=0.33"
        ],
        "halving by 2, noise, three kept": [f"{PRUNER}.reduction_factor=2"],
    },
    "rungs": {
        "four even rungs": ["trainer.eval_steps=0.25"],
        "rungs at 1/2": ["trainer.eval_steps=0.5"],
        "rungs at 1/9, 1/3": ["trainer.eval_steps=[0.1112,0.3334]"],
        "rungs at each 9th": ["trainer.eval_steps=0.1111"],
        "rungs at 1/27, 1/9, 1/3": ["trainer.eval_steps=[0.03704,0.1112,0.3334]"],
    },
    "start": {
        f"{number} random": [f"hydra.sweeper.sampler.n_startup_trials={number}"]
        for number in (4, 8, 16)
    },
    "sampler": {
        name: [f"hydra/sweeper/sampler={name}"]
        for name in ("random", "qmc", "cmaes", "gp")
    },
}
"""By what varies: the names of variants and their overrides."""


@dataclass(frozen=True)
class StudyConfig:
    """A study's config, as far as a replay needs it."""

    settings: StudySettings
    space: Space
    baseline: Point
    eval_steps: float | list[float]
    warmup: float
    """Share of a run's steps."""

    def rung_steps(self, total: int) -> list[int]:
        """Return the steps at which a run reports, the last one included."""
        return [step for step in evaluation_rungs(self.eval_steps, total) if step]


def compose_study(overrides: Sequence[str], learning_rate: float) -> StudyConfig:
    """Compose a study's config as a command line with these overrides does.

    Args:
        overrides: of the default study.
        learning_rate: that of the base, the baseline's.
    """
    rate = f"optimizer.learning_rate={learning_rate}"
    with initialize_config_dir(str(CONF)):
        config = compose(
            "config",
            ["hydra/sweeper=optuna", rate, *overrides],
            return_hydra_config=True,
        )
    sweeper: Any = OmegaConf.to_container(config.hydra.sweeper, resolve=True)
    params: Any = OmegaConf.to_container(config.search.params)
    resolve_study_eval_steps(config, STUDY_EVAL_STEPS)
    trainer: Any = OmegaConf.to_container(config.trainer)
    del sweeper["_target_"]
    replaced = {"study_name": "replay", "direction": "minimize", "params": params}
    space = scaled_space(Space.parse(params, []), config)
    baseline = config_point(space, config)
    assert baseline is not None, "the default space has the config's own values"
    return StudyConfig(
        StudySettings.from_sweeper({**sweeper, **replaced}),
        space,
        baseline,
        trainer["eval_steps"],
        config.optimizer.warmup_ratio,
    )
