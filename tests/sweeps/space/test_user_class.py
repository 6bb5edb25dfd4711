"""Samplers and pruners of the user's own, by `_target_`."""

import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.pruners import MedianPruner, PatientPruner
from optuna.samplers import RandomSampler, TPESampler
from support.commands import Station
from support.configs import study_overrides
from support.study_folder import trials_of

from finetune.errors import ConfigError
from sweeps.space.custom import load_function
from sweeps.space.user_class import make_instance, without_choice_arguments

KEY = "hydra.sweeper.sampler"

MODULE = """
from optuna.pruners import ThresholdPruner
from optuna.samplers import RandomSampler

class MySampler(RandomSampler):
    def __init__(self, low=0.5):
        super().__init__(seed=3)
        self.low = low
    def sample_independent(self, study, trial, name, distribution):
        return 8 if name == "lora.r" else super().sample_independent(study, trial, name, distribution)

def make(seed):
    return RandomSampler(seed)

def make_pruner():
    return ThresholdPruner(upper=0.0)

def nothing():
    return None

def raises(seed=0):
    raise RuntimeError("no licence\\nat all")

value = 3
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory, by a name that no other test has."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / f"{name}_broken.py").write_text("import no_such_package")
    monkeypatch.chdir(tmp_path)
    return name


def made(path: str, **arguments: Any) -> Any:
    settings = {"_target_": path, **arguments}
    return make_instance(KEY, settings, optuna.samplers.BaseSampler)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_class_and_a_function_make_a_sampler(own_module: str) -> None:
    sampler = made(f"{own_module}.MySampler", low=0.25)
    assert sampler.low == 0.25
    assert isinstance(made(f"{own_module}.make", seed=1), RandomSampler)
    assert isinstance(made("optuna.samplers.TPESampler"), TPESampler)
    wrapped = {"_target_": "optuna.pruners.MedianPruner"}
    arguments = {
        "_target_": "optuna.pruners.PatientPruner",
        "wrapped_pruner": wrapped,
        "patience": 1,
    }
    pruner = make_instance("k", arguments, optuna.pruners.BasePruner)
    assert isinstance(pruner, PatientPruner)
    assert isinstance(pruner._wrapped_pruner, MedianPruner)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("MySampler", "=MySampler: must be an import path, as my_module.MyClass"),
        (
            "no_such.MySampler",
            "no_such can't be imported (ModuleNotFoundError: No module",
        ),
        ("OWN.Other", "has no class or function Other"),
        ("OWN.value", "has no class or function value"),
        (
            "OWN_broken.A",
            "can't be imported (ModuleNotFoundError: No module named 'no_",
        ),
        (
            "OWN.nothing",
            "returns a NoneType; must be a BaseSampler of Optuna, or a function",
        ),
        (
            "OWN.make_pruner",
            "returns a ThresholdPruner; must be a BaseSampler of Optuna",
        ),
        ("OWN.raises", ": RuntimeError: no licence"),
        ("OWN.make", "missing 1 required positional argument: 'seed'"),
        ("collections.OrderedDict", "must be a BaseSampler of Optuna, or a function"),
    ],
)
def test_a_wrong_target_is_refused_in_one_line(
    path: str, message: str, own_module: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        made(path.replace("OWN", own_module))
    line = str(refused.value)
    assert line.startswith(KEY)
    assert message in line
    assert "\n" not in line


def test_arguments_of_the_chosen_yaml_are_left_out_where_the_class_takes_none(
    own_module: str,
) -> None:
    of_choice = {
        "seed": None,
        "n_startup_trials": 10,
        "n_ei_candidates": 24,
        "multivariate": True,
        "group": False,
        "constant_liar": True,
        "constraints_func": None,
    }
    path = f"{own_module}.MySampler"
    arguments = {"_target_": path, **of_choice}
    assert without_choice_arguments(KEY, "tpe", arguments) == {"_target_": path}
    # What the user has written is passed on, and refused by the class itself.
    changed = {**arguments, "group": True, "low": 0.1}
    expected = {"_target_": path, "group": True, "low": 0.1}
    assert without_choice_arguments(KEY, "tpe", changed) == expected
    tpe = {"_target_": "optuna.samplers.TPESampler", **of_choice}
    assert without_choice_arguments(KEY, "tpe", tpe) == tpe


def test_a_study_has_the_users_sampler_and_pruner(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    ended = station.run(
        *study_overrides(tiny_base, "s"),
        "n_trials=3",
        "hydra.sweeper.sampler._target_=mine.MySampler",
        "hydra.sweeper.pruner._target_=mine.make_pruner",
        "trainer.eval_steps=1",
        cwd=tmp_path,
    )
    assert ended.returncode == 0, ended.stderr
    trials = trials_of(tmp_path)
    assert [trial.params["lora.r"] for trial in trials[1:]] == [8, 8]
    # The pruner lets nothing but the baseline go on.
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "PRUNED"]
    refused = station.run(
        *study_overrides(tiny_base, "t"),
        "hydra.sweeper.sampler._target_=mine.raises",
        cwd=tmp_path,
    )
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1] == (
        "error: hydra.sweeper.sampler: mine.raises: RuntimeError: no licence at all"
    )


def test_a_function_is_found_in_the_working_directory(
    own_module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script `finetune` does not look there by itself, unlike `python -m finetune`."""
    elsewhere = [path for path in sys.path if path not in ("", str(Path.cwd()))]
    monkeypatch.setattr(sys, "path", elsewhere)
    function = load_function(f"{own_module}.nothing")
    assert function() is None
    # As Hydra's own look-up does, also a method of a class.
    method = load_function(f"{own_module}.MySampler.sample_independent")
    assert method.__name__ == "sample_independent"
    with pytest.raises(ConfigError, match=r"custom_search_space=.*: no such function"):
        load_function(f"{own_module}_broken.nothing")
