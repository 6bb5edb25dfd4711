"""Studies that begin with the results or the points of earlier ones."""

import json
import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial
from support.commands import Station
from support.configs import study_overrides
from support.studies import settings_of
from support.study_folder import folder_of

from finetune.errors import ConfigError
from finetune.quantities import counted
from sweeps.space.distributions import suggest
from sweeps.space.space import Point, Space
from sweeps.study.earlier_results import WarmStartSampler
from sweeps.study.result_values import ConfigValues
from sweeps.study.storage import open_storage
from sweeps.study.study import Study
from sweeps.study.terms import stored_space
from sweeps.study.warm_start import (
    earlier_trials,
    require_studies,
    take_earlier_studies,
)

SPACE = Space.parse(
    {"lora.r": "choice(4,8,16)", "lora.dropout": "interval(0.0, 0.2)"}, []
)
TERMS: dict[str, Any] = {
    "objective": "eval/loss",
    "hydra.sweeper.direction": ["minimize"],
    "model.name_or_path": "smollm2_135m",
    "dataset_fingerprint": "abc",
    "trainer.max_steps": 60,
    "lora.alpha": 16,
    "lora.target_modules": "all-linear",
}


def made(
    cwd: Path,
    name: str,
    *trials: FrozenTrial,
    space: Space = SPACE,
    terms: dict[str, Any] = TERMS,
) -> Study:
    folder = folder_of(cwd, name)
    folder.mkdir(parents=True)
    study = optuna.create_study(study_name=name, storage=open_storage(None, folder))
    stored = dict(terms)
    for key, plain in space.to_dict().items():
        stored[f"space.{key}"] = plain
    study.set_user_attr("terms", stored)
    study.add_trials(trials)
    (folder / "study.json").write_text(json.dumps({"name": name, "storage": None}))
    return Study.load(folder)


def trial_of(
    rank: Any, dropout: float, loss: float | None, space: Space = SPACE, **more: Any
) -> FrozenTrial:
    state = TrialState.COMPLETE if loss is not None else TrialState.PRUNED
    params = {"lora.r": rank, "lora.dropout": dropout, **more}
    return create_trial(
        state=state,
        params=params,
        distributions={name: space.distributions[name] for name in params},
        value=loss,
        intermediate_values={1: 3.0},
    )


EARLIER = (
    trial_of(8, 0.1, 2.0),
    trial_of(4, 0.0, 2.5),
    trial_of(16, 0.2, 2.2),
    trial_of(16, 0.05, 2.3),
    trial_of(4, 0.2, None),
)
BEST: Point = {"lora.r": 8, "lora.dropout": 0.1}


OWN = {
    **{key: value for key, value in TERMS.items() if "." in key},
    "lora.r": 8,
    "lora.dropout": 0.1,
}
"""The config's own values, of what is searched too."""


def config_values(space: Space, own: dict[str, Any] = OWN) -> ConfigValues:
    sets = {}
    for name, variants in space.variants.items():
        keys = space.keys_of(name)
        sets[name] = {
            variant: {key: values.get(key, own[key]) for key in keys}
            for variant, values in variants.items()
        }
    return ConfigValues(own, sets)


def taken(
    study: Study, *overrides: str, space: Space = SPACE
) -> tuple[list[Point], list[FrozenTrial]]:
    settings = settings_of("hydra.sweeper.warm_start=s0", *overrides)
    points = take_earlier_studies(study, settings, space, lambda: config_values(space))
    assert all(role == "warm_start" for role, _ in points)
    return [point for _, point in points], earlier_trials(study, space)


def test_results_are_taken_where_only_the_search_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    earlier = made(tmp_path, "s0", *EARLIER)
    study = made(tmp_path, "s")
    with caplog.at_level("INFO"):
        points, results = taken(study)
    assert points == [BEST]
    assert [(trial.params, trial.values) for trial in results] == [
        (trial.params, trial.values) for trial in EARLIER
    ]
    assert results[-1].intermediate_values == {1: 3.0}
    assert caplog.messages == [
        "warm start: s0: 5 results for the sampler, 1 point to train"
    ]
    # A resumed study takes the same ones, and those only, though the earlier study has gone on.
    earlier.optuna.add_trial(trial_of(8, 0.15, 1.0))
    with caplog.at_level("INFO"):
        assert taken(Study.load(study.folder))[0] == [BEST]
    assert len(caplog.messages) == 1
    assert len(earlier_trials(study, SPACE)) == 5
    # They are no trials of the study.
    assert study.trials() == []
    assert study.ranked() == []


WIDE = Space.parse(
    {
        "lora.r": "choice(4,8,16)",
        "lora.dropout": "interval(0.0, 0.2)",
        "lora.alpha": "choice(8,16)",
        "lora.target_modules": "choice(all-linear,[q_proj])",
    },
    [],
)


def test_what_one_of_the_studies_searches_the_other_has_in_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made(tmp_path, "s0", *EARLIER[:2])
    fixed = ("lora.alpha", "lora.target_modules")
    terms = {key: value for key, value in TERMS.items() if key not in fixed}
    wide = made(tmp_path, "wide", space=WIDE, terms=terms)
    points, results = taken(wide, space=WIDE)
    # What the earlier study has not searched is left to the sampler where a point is trained again.
    assert points == [BEST]
    assert results[0].params == {
        **BEST,
        "lora.alpha": 16,
        "lora.target_modules": "all-linear",
    }
    # The other way round, of the wide study's trials those with this study's values.
    chosen = {"lora.alpha": 16, "lora.target_modules": "all-linear"}
    other = {"lora.alpha": 8, "lora.target_modules": "[q_proj]"}
    folder = tmp_path / "back"
    folder.mkdir()
    monkeypatch.chdir(folder)
    trials = (
        trial_of(8, 0.1, 1.0, WIDE, **other),
        trial_of(4, 0.1, 2.0, WIDE, **chosen),
    )
    made(folder, "s0", *trials, space=WIDE, terms=terms)
    _, results = taken(made(folder, "s"))
    assert [trial.params for trial in results] == [{"lora.r": 4, "lora.dropout": 0.1}]


@pytest.mark.parametrize(
    ("change", "override", "reason"),
    [
        ({"dataset_fingerprint": "b"}, "", "other rows"),
        (
            {"model.name_or_path": "x"},
            "",
            "model.name_or_path=x instead of smollm2_135m",
        ),
        ({"objective": "eval/accuracy"}, "", "objective=eval/accuracy instead of"),
        ({"trainer.max_steps": 9}, "", "trainer.max_steps=9 instead of 60"),
        ({}, "hydra/sweeper/sampler=cmaes", "this sampler does not learn from them"),
        ({}, "hydra/sweeper/sampler=random", "this sampler does not learn from them"),
    ],
)
def test_otherwise_the_best_points_are_trained_again(
    change: dict[str, Any],
    override: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    made(tmp_path, "s0", *EARLIER, terms=TERMS | change)
    with caplog.at_level("INFO"):
        points, results = taken(made(tmp_path, "s"), *filter(None, [override]))
    assert results == []
    ranks = [(point["lora.r"], point["lora.dropout"]) for point in points]
    assert ranks == [(8, 0.1), (16, 0.2), (16, 0.05)]
    assert caplog.messages[0].startswith(
        "warm start: s0: 0 results for the sampler, 3 points to train; "
        f"5 trials left out: 5 ({reason}"
    )


def test_values_outside_the_space_are_left_to_the_sampler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made(tmp_path, "s0", *EARLIER)
    narrow = Space.parse(
        {"lora.r": "choice(4,16)", "lora.dropout": "interval(0, 0.1)"}, []
    )
    points, results = taken(made(tmp_path, "s", space=narrow), space=narrow)
    assert points == [{"lora.dropout": 0.1}]
    assert [trial.params["lora.r"] for trial in results] == [4, 16]


@pytest.mark.parametrize(
    ("name", "message"),
    [("s9", "warm_start: s9: no such study"), ("s", "warm_start=s: is this study")],
)
def test_a_missing_study_is_refused_before_the_study_begins(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study = made(tmp_path, "s")
    settings = settings_of(f"hydra.sweeper.warm_start=[{name}]")
    with pytest.raises(ConfigError, match=message):
        take_earlier_studies(study, settings, SPACE, lambda: config_values(SPACE))
    # A resumed study may have taken it already.
    require_studies(settings, study.folder)
    if name == "s9":
        with pytest.raises(ConfigError, match=message):
            require_studies(settings, folder_of(tmp_path, "new"))


def loss(params: dict[str, Any]) -> float:
    return (math.log10(params["rate"]) + 3) ** 2 + float(params["dropout"])


def test_a_sampler_that_has_seen_results_needs_no_random_trials() -> None:
    space = Space.parse(
        {"rate": "tag(log, interval(1e-6, 1))", "dropout": "interval(0.0, 1.0)"}, []
    )

    def search(trials: int, earlier: list[FrozenTrial], seed: int) -> list[FrozenTrial]:
        study = optuna.create_study()
        for number in range(trials):
            sampler = TPESampler(seed=seed * 100 + number, n_startup_trials=10)
            study.sampler = WarmStartSampler(sampler, earlier) if earlier else sampler
            trial = study.ask()
            for name, distribution in space.distributions.items():
                suggest(trial, name, distribution)
            study.tell(trial, loss(trial.params))
        return study.trials

    cold, warm = [], []
    for seed in range(5):
        first = search(30, [], seed)
        for trial in first:
            trial.number = -1
        cold += [trial.value for trial in search(8, [], seed + 50)]
        warm += [trial.value for trial in search(8, first, seed + 50)]
    assert len(warm) == len(cold) == 40
    assert sum(warm) < sum(cold) / 2


def test_a_study_begins_with_an_earlier_ones_results_and_resumes_with_them(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    def run(name: str, *more: str) -> str:
        ended = station.run(*study_overrides(tiny_base, name), *more, cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr
        return str(ended.stderr)

    run("s0", "n_trials=4", "hydra/sweeper/pruner=none")
    first = Study.load(folder_of(tmp_path, "s0"))
    best = first.ranked()[0]
    warm = "hydra.sweeper.warm_start=[s0]"
    said = run("s1", "n_trials=2", warm)
    assert "warm start: s0: 4 results for the sampler, 1 point to train\n" in said
    said = run("s1", "n_trials=3", warm)
    assert "warm start: " not in said
    trials = Study.load(folder_of(tmp_path, "s1")).trials()
    assert [trial.state.is_finished() for trial in trials] == [True] * 3
    points = [trial.params for trial in trials]
    assert points.count(best.params) == 1
    assert trials[0].user_attrs["role"] == "baseline"
    # With the same seed and rows the point has the same result.
    (again,) = (trial for trial in trials if trial.params == best.params)
    assert again.value == pytest.approx(best.value, abs=1e-5)
    said = run("s2", "n_trials=1", warm, "trainer.max_steps=2")
    assert "4 trials left out: 4 (trainer.max_steps=3 instead of 2)" in said


def test_a_variant_gives_the_values_of_its_keys_to_a_study_that_searches_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = Space.parse(
        {"size": "tag(variants, choice({small: {lora.r: 4}, default: {}}))"}, []
    )
    trials = []
    for loss, size in ((2.0, "default"), (2.1, "small")):
        trial = create_trial(
            params={"size": size}, distributions=sizes.distributions, value=loss
        )
        trials.append(trial)
    made(tmp_path, "s0", *trials, space=sizes)
    study = made(tmp_path, "s")
    with caplog.at_level("INFO"):
        points, results = taken(study)
    # What a variant leaves out is known from its run.
    assert (points, results) == ([{"lora.r": 4}], [])
    assert "0 results for the sampler, 1 point to train; 2 trials left" in caplog.text


BOUND = "hydra.sweeper.constraints=['eval/accuracy >= 0.6']"


def test_this_studys_constraints_are_computed_from_the_earlier_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    other = {"hydra.sweeper.constraints": ["adapter/parameters <= 10"]}
    study = made(tmp_path, "s0", *EARLIER, terms=TERMS | other)
    # The best one violates the bound, the second one has no such figure.
    for number, figures in enumerate(
        ({"eval/accuracy": 0.5}, {}, {"eval/accuracy": 0.7})
    ):
        study.folder_of(number).path.mkdir(parents=True)
        study.folder_of(number).result.write_text(json.dumps({"metrics": figures}))
    with caplog.at_level("INFO"):
        points, results = taken(made(tmp_path, "s"), BOUND)
    assert [trial.params["lora.r"] for trial in results] == [8, 16, 4]
    first, second, pruned = [list(trial.constraints.values()) for trial in results]
    assert (first, second) == ([pytest.approx(0.1)], [pytest.approx(-0.1)])
    # It has not been evaluated by the metric yet.
    assert pruned == []
    assert (
        "3 results for the sampler, 1 point to train; 2 trials left out: "
        in caplog.text
    )
    assert "2 (no eval/accuracy for a constraint)" in caplog.text
    # The best feasible one that is known, not the best one.
    assert points == [{"lora.r": 16, "lora.dropout": 0.2}]


def test_a_bound_of_both_studies_is_known_without_the_earlier_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trial = trial_of(8, 0.1, 2.0)
    trial.set_constraint("eval/accuracy >= 0.6", -0.2)
    made(tmp_path, "s0", trial)
    _, results = taken(made(tmp_path, "s"), BOUND)
    assert [each.constraints for each in results] == [{"eval/accuracy >= 0.6": -0.2}]


def test_every_trial_that_is_left_out_is_counted_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    failed = create_trial(state=TrialState.FAIL)
    waiting = create_trial(state=TrialState.WAITING)
    running = create_trial(state=TrialState.RUNNING)
    outside = trial_of(8, 0.1, 1.0)
    made(tmp_path, "s0", *EARLIER, failed, waiting, running, outside)
    narrow = Space.parse(
        {"lora.r": "choice(8,16)", "lora.dropout": "interval(0, 0.1)"}, []
    )
    with caplog.at_level("INFO"):
        taken(made(tmp_path, "s", space=narrow), space=narrow)
    assert caplog.messages == [
        "warm start: s0: 3 results for the sampler, 1 point to train; 5 trials left out: "
        "2 (lora.r outside choice(8, 16)), 1 (lora.dropout outside interval(0.0, 0.1)), "
        "1 (failed), 1 (not finished)"
    ]


FIRST = """
params:
  size: {variants: {default: {}, small: {lora.r: 4, lora.alpha: "${lora.r}"}}}
  optimizer.lr_scheduler_type: choice(cosine,constant)
  optimizer.warmup_ratio: {search: "interval(0.1, 0.5)", when: {optimizer.lr_scheduler_type: cosine}}
"""
SECOND = """
params:
  lora.r: choice(4,16)
  lora.alpha: choice(4,16)
  optimizer.lr_scheduler_type: choice(cosine,constant)
  optimizer.warmup_ratio: {search: "interval(0, 0.5)", when: {optimizer.lr_scheduler_type: cosine}}
"""


@pytest.mark.slow
def test_a_study_of_conditions_and_variants_is_wholly_taken(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    """By one that searches the keys of the variants, and has a constraint; and the other way."""
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "first.yaml").write_text(FIRST)
    (tmp_path / "search" / "second.yaml").write_text(SECOND)

    def run(name: str, *more: str) -> str:
        common = ("--config-dir", ".", "hydra/sweeper/pruner=none")
        ended = station.run(
            *study_overrides(tiny_base, name), *common, *more, cwd=tmp_path
        )
        assert ended.returncode == 0, ended.stderr
        return str(ended.stderr)

    run("s0", "search=first", "n_trials=6")
    bound = "hydra.sweeper.constraints=['adapter/parameters <= 1e9']"
    said = run(
        "s1", "search=second", "n_trials=4", "hydra.sweeper.warm_start=s0", bound
    )
    assert "warm start: s0: 6 results for the sampler, 1 point to train\n" in said
    second = Study.load(folder_of(tmp_path, "s1"))
    space = Space.from_dict(stored_space(second.optuna.user_attrs["terms"]))
    results = earlier_trials(second, space)
    assert {trial.params["lora.r"] for trial in results} == {4, 16}
    assert all(
        trial.params["lora.alpha"] == trial.params["lora.r"] for trial in results
    )
    assert all(
        trial.constraints.keys() == {"adapter/parameters <= 1e9"} for trial in results
    )
    page = station.run("report", "s1", module="sweeps", cwd=tmp_path)
    assert page.returncode == 0, page.stderr
    text = (second.folder / "report.html").read_text()
    assert "s0: 6 results for the sampler, 1 point to train" in text

    said = run("s2", "search=first", "n_trials=3", "hydra.sweeper.warm_start=s1")
    taken_results = [
        trial.params
        for trial in second.trials()
        if trial.params["lora.alpha"] == trial.params["lora.r"]
        and trial.params.get("optimizer.warmup_ratio", 0.1) >= 0.1
    ]
    assert f"warm start: s1: {counted(len(taken_results), 'result')} for" in said
    assert "trials left out: " in said or len(taken_results) == 4


@pytest.mark.slow
def test_what_a_searched_group_sets_is_compared_key_by_key(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    def run(name: str, *more: str) -> str:
        ended = station.run(
            *study_overrides(tiny_base, name),
            "~search",
            "hydra/sweeper/pruner=none",
            *more,
            cwd=tmp_path,
        )
        assert ended.returncode == 0, ended.stderr
        return str(ended.stderr)

    run("s0", "lora=choice(r4,r8)", "n_trials=3")
    warm = "hydra.sweeper.warm_start=s0"
    said = run(
        "s1", "lora=r8", "optimizer.weight_decay=choice(0.0,0.1)", "n_trials=2", warm
    )
    # The baseline has r of 16.
    assert (
        "warm start: s0: 1 result for the sampler, 0 points to train; 2 trials left out: "
        "2 (lora.r is not 8)\n"
    ) in said
    warm = "hydra.sweeper.warm_start=s1"
    said = run("s2", "lora=choice(r8,r16)", "n_trials=1", warm)
    assert (
        "warm start: s1: 1 result for the sampler, 0 points to train; 1 trial left out: "
        "1 (optimizer.weight_decay is not 0.0)\n"
    ) in said
    second = Study.load(folder_of(tmp_path, "s2"))
    space = Space.from_dict(stored_space(second.optuna.user_attrs["terms"]))
    assert [trial.params for trial in earlier_trials(second, space)] == [{"lora": "r8"}]
