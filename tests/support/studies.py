"""Studies with made-up trials, and their settings."""

import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
)
from optuna.trial import FrozenTrial, TrialState, create_trial

from finetune.config.paths import CONF
from sweeps.space.settings import StudySettings
from sweeps.study.study import Study


def sweeper_config(*overrides: str) -> DictConfig:
    """Compose the config of a sweep, with the node `hydra`."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONF)):
        return compose(
            "config", ["hydra/sweeper=optuna", *overrides], return_hydra_config=True
        )


def settings_of(*overrides: str) -> StudySettings:
    """Settings with the direction that a draft resolves for the loss."""
    values = OmegaConf.to_container(
        sweeper_config(*overrides).hydra.sweeper, resolve=True
    )
    assert isinstance(values, dict)
    plain = {str(key): value for key, value in values.items() if key != "_target_"}
    if plain["direction"] == "auto":
        plain["direction"] = "minimize"
    return StudySettings.from_sweeper(
        plain | {"study_name": "s", "params": plain["params"] or {}}
    )


def made_study(
    folder: Path, trials: Sequence[Any], *objectives: str, direction: str = "minimize"
) -> Any:
    """Write a study with the given trials, without running any."""

    from sweeps.study.storage import open_storage

    folder.mkdir(parents=True)
    names = list(objectives) or ["eval/loss"]
    study = optuna.create_study(
        study_name=folder.name,
        storage=open_storage(None, folder),
        directions=[direction] * len(names),
    )
    study.set_user_attr("uid", "made")
    study.set_user_attr("terms", {"objective": names[0] if len(names) == 1 else names})
    study.add_trials(trials)
    (folder / "study.json").write_text(
        json.dumps({"name": folder.name, "storage": None})
    )
    return Study.load(folder)


SPACE: dict[str, BaseDistribution] = {
    "lora.r": CategoricalDistribution([4, 8, 16, 32, 64]),
    "lora.dropout": FloatDistribution(0, 0.15),
    "optimizer.learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
}
COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL


def trial(
    draw: random.Random, state: TrialState = COMPLETE, **given: Any
) -> FrozenTrial:
    """A trial whose loss falls with its learning rate, and with nothing else."""
    params = {
        "lora.r": draw.choice([4, 8, 16, 32, 64]),
        "lora.dropout": draw.uniform(0, 0.15),
        "optimizer.learning_rate": 10 ** draw.uniform(-4, -2),
    } | given.pop("params", {})
    loss = 3 - 0.3 * math.log10(params["optimizer.learning_rate"] * 1e4)
    rungs = {COMPLETE: 4, PRUNED: 1}.get(state, 0)
    reported = {rung: loss - 0.1 * rung for rung in range(1, rungs + 1)}
    notes = {
        "steps": 60,
        "step": 60 if state == COMPLETE else 15,
        "reason": "worse than others at this rung",
    }
    return create_trial(
        state=state,
        params=params,
        distributions={name: SPACE[name] for name in params},
        user_attrs=notes | ({"error": "<b>out of memory</b>"} if state == FAIL else {}),
        **{
            "intermediate_values": reported,
            "value": loss - 0.4 if state == COMPLETE else None,
        }
        | given,
    )


def text_of(path: Path) -> str:
    """The page without plotly's own code."""
    return re.sub(
        r"<script>.*?</script>",
        "",
        path.read_text(encoding="utf-8"),
        count=1,
        flags=re.DOTALL,
    )


def two_values(draw: random.Random) -> FrozenTrial:
    return create_trial(
        params={"lora.r": 8},
        distributions={"lora.r": SPACE["lora.r"]},
        values=[draw.random(), draw.random()],
    )


def kinds() -> dict[str, tuple[list[FrozenTrial], list[str]]]:
    draw = random.Random(0)
    nan = trial(draw, PRUNED)
    nan.intermediate_values = {1: math.nan}
    infinite = [trial(draw) for _ in range(9)]
    infinite[3].values = [math.inf]
    partial = trial(draw)
    del partial._distributions["lora.dropout"], partial._params["lora.dropout"]
    waiting = create_trial(state=TrialState.WAITING)
    return {
        "empty": ([], []),
        "waiting": ([waiting] * 3, []),
        "one": ([trial(draw)], []),
        "two": ([trial(draw), trial(draw, PRUNED)], []),
        "failed": ([trial(draw, FAIL) for _ in range(3)], []),
        "pruned": ([trial(draw, PRUNED) for _ in range(9)], []),
        "nan": (
            [
                trial(draw),
                nan,
                trial(draw, PRUNED, intermediate_values={1: math.inf}),
                trial(draw),
            ],
            [],
        ),
        "infinite": (infinite, []),
        "partial": ([*(trial(draw) for _ in range(9)), partial], []),
        "no-parameters": ([create_trial(value=1.0), create_trial(value=2.0)], []),
        "equal": (
            [trial(draw, value=1.0, intermediate_values={1: 1.0}) for _ in range(10)],
            [],
        ),
        "two-objectives": (
            [two_values(draw) for _ in range(9)],
            ["eval/loss", "adapter/parameters"],
        ),
        "mixed": ([trial(draw, state) for state in (COMPLETE, PRUNED, FAIL) * 5], []),
    }


def made_unchecked(folder: Path, trials: list[FrozenTrial]) -> Study:
    """A study with trials that Optuna would not take any more, as one has that went on under
    `allow_change`."""
    study = made_study(folder, [])
    for each in trials:
        study.storage.create_new_trial(study.optuna._study_id, each)
    return study


PRUNERS = sorted(file.stem for file in (CONF / "hydra/sweeper/pruner").glob("*.yaml"))
PRUNERS_ALLOWED = ("optuna.pruners.*", "sweeps.space.pruners.*")


def composed(*overrides: str) -> DictConfig:
    """A sweep's config, Hydra's part included."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONF)):
        return compose(
            "config", ["hydra/sweeper=optuna", *overrides], return_hydra_config=True
        )
