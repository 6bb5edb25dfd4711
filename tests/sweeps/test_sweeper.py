"""The sweeper as Hydra finds it, and the baseline of a searched limit."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig
from optuna.trial import BaseTrial
from support.configs import compose, study_overrides
from support.studies import sweeper_config

from finetune.app import compose_sweep
from finetune.config.paths import CONF
from finetune.errors import ConfigError
from sweeps.study.draft import Draft, draft_session
from sweeps.study.session import Session


def test_hydra_finds_the_sweeper() -> None:
    assert "StudySweeper" in [
        sweeper.__name__ for sweeper in Plugins.instance().discover(Sweeper)
    ]


def drafted(
    arguments: list[str], *settings: str, search: str | None = "~search"
) -> Draft:
    """Check a sweep command as the sweeper does."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import HydraContext

    config = sweeper_config(
        "hydra.sweeper.study_name=s", *([search] if search else []), *settings
    )
    with initialize_config_dir(str(CONF)):
        HydraConfig.instance().set_config(config)
        context = HydraContext(
            config_loader=GlobalHydra.instance().config_loader(),
            callbacks=cast(Any, None),
        )
        sweeper = cast(
            Any,
            Plugins.instance().instantiate_sweeper(
                hydra_context=context, task_function=lambda config: None, config=config
            ),
        )
        return draft_session(config, context, sweeper._values, arguments)


@pytest.mark.parametrize(
    ("searched", "overrides", "limit"),
    [
        ("dataset.limit=int(interval(100,300))", (), 240),
        ("dataset.limit=choice(100,240)", (), 240),
        ("dataset.limit=100,null", ("dataset.path=rows.jsonl",), "null"),
    ],
)
def test_the_baseline_of_a_searched_limit_has_the_number_that_auto_stands_for(
    searched: str, overrides: tuple[str, ...], limit: int | str
) -> None:
    draft = drafted([searched, *overrides])

    assert draft.points == [("baseline", {"dataset.limit": limit})]


def further(config: DictConfig, trial: BaseTrial) -> None:
    """Suggests by what the trial has: a number, a group, None, a list and a key with `+`."""
    assert trial.params["lora.alpha"] == 16
    trial.suggest_float("optimizer.weight_decay", 0.0, 0.1)
    if trial.suggest_categorical("optimizer", ["adamw", "lion"]) == "lion":
        trial.suggest_float("optimizer.adam_beta1", 0.8, 0.9)
    trial.suggest_categorical("trainer.early_stopping_patience", [None, 2])
    trial.suggest_categorical("lora.target_modules", ["all-linear", "[q_proj]"])
    trial.suggest_int("++lora.r", 4, 64, log=True)


def beside(config: DictConfig, trial: BaseTrial) -> None:
    trial.suggest_float("optimizer.weight_decay", 0.1, 0.2)


def absent(config: DictConfig, trial: BaseTrial) -> None:
    trial.suggest_categorical("lora.r", [4, 8])


CUSTOM = "hydra.sweeper.custom_search_space"


@pytest.mark.parametrize("searched", [["lora.alpha=choice(8,16)"], []])
def test_the_baseline_is_the_configs_values_of_a_custom_space_too(
    searched: list[str],
) -> None:
    point = {
        "lora.alpha": 16,
        "optimizer.weight_decay": 0.0,
        "optimizer": "adamw",
        "trainer.early_stopping_patience": None,
        "lora.target_modules": "all-linear",
        "++lora.r": 16,
    }
    name = "further" if searched else "alone"
    draft = drafted(searched, f"{CUSTOM}={__name__}.{name}")
    assert draft.points == [("baseline", point)]
    overrides = draft.session.space.overrides(draft.points[0][1])
    assert "trainer.early_stopping_patience=null" in overrides


def alone(config: DictConfig, trial: BaseTrial) -> None:
    """The same without any other parameter."""
    trial.suggest_categorical("lora.alpha", [8, 16])
    further(config, trial)


@pytest.mark.parametrize("name", ["beside", "absent"])
def test_a_custom_space_without_the_configs_values_has_no_baseline(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        draft = drafted(["lora.alpha=choice(8,16)"], f"{CUSTOM}={__name__}.{name}")
    assert draft.points == []
    assert "no baseline: " in caplog.text


def reading(config: DictConfig, trial: BaseTrial) -> None:
    trial.suggest_float("lora.dropout", 0.0, trial.params["lora.alpha"] / 100)


def test_a_custom_space_that_reads_a_value_outside_the_space_has_no_baseline(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO"):
        draft = drafted(["lora.alpha=choice(8,32)"], f"{CUSTOM}={__name__}.reading")
    assert draft.points == []
    assert (
        "no baseline: lora.alpha=16: the config's own value lies outside the space, and "
        "custom_search_space reads it"
    ) in caplog.text


def test_an_interpolation_in_a_space_is_resolved_in_each_trial(tmp_path: Path) -> None:
    (tmp_path / "search").mkdir()
    space = "params: {lora: {r: [4, 8], alpha: '${lora.r}'}}"
    (tmp_path / "search" / "mine.yaml").write_text(space)
    draft = drafted(
        [], "search=mine", f"hydra.searchpath=[file://{tmp_path}]", search=None
    )
    space_of_study = draft.session.space
    for rank in (4, 8):
        overrides = space_of_study.overrides({"lora.r": rank})
        assert sweeper_config(*overrides).lora.alpha == rank


def test_trials_share_their_sources_and_weights() -> None:
    config = compose("dataset.path=[a.jsonl,{path:b.jsonl,weight:2}]")
    session = cast(Any, SimpleNamespace(common=config))
    limited = dataclasses.replace(config.dataset, limit=5)
    assert Session.check(session, dataclasses.replace(config, dataset=limited))
    with pytest.raises(ConfigError, match=r"dataset\.path=.*measured on the same rows"):
        Session.check(
            session, compose("dataset.path=[a.jsonl,{path:b.jsonl,weight:3}]")
        )


def test_short_forms_of_a_study_mean_its_keys() -> None:
    overrides = ["hydra/sweeper=optuna", "study=s1", "n_trials=20"]
    _, sweeper = compose_sweep(overrides, multirun=True)
    assert (sweeper["study_name"], sweeper["n_trials"]) == ("s1", 20)


@pytest.mark.slow
def test_a_study_imports_no_compiler_of_torch(tiny_base: Path, tmp_path: Path) -> None:
    code = """
import sys
from finetune.__main__ import main

try:
    main()
finally:
    assert "bitsandbytes" in sys.modules
    assert "torch._inductor.compile_fx" not in sys.modules
"""
    words = [*study_overrides(tiny_base, "s"), "hydra.sweeper.n_trials=1"]
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
