"""Compose configs, and the overrides of a run or a study that takes seconds."""

from pathlib import Path

from finetune.config.paths import CONF
from finetune.config.schema import RunConfig


def compose(*overrides: str) -> RunConfig:
    """Compose and check the config of a command line."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(CONF)):
        return RunConfig.from_hydra(hydra_compose("config", list(overrides)))


def tiny_overrides(tiny_base: Path) -> list[str]:
    """Return the overrides of a run that takes seconds."""
    return [
        f"model.name_or_path={tiny_base}",
        "tracker=none",
        "dataset.limit=24",
        "dataset.eval_fraction=0.02",
        "dataset.test_fraction=0.02",
        "sample_max_length=64",
        "trainer.logging_steps=1",
    ]


def study_overrides(tiny_base: Path, name: str) -> list[str]:
    """Return the arguments of a study whose trials take about a second."""
    return [
        "-m",
        "hydra/sweeper=optuna",
        f"hydra.sweeper.study_name={name}",
        *tiny_overrides(tiny_base),
        "quantization=none",
        "dataset.max_length=64",
        "sample_prompts=[]",
        "trainer.max_steps=3",
    ]
