"""The example applications of hydra-optuna-sweeper 1.4.0rc3, by their own tests' criteria.

Its sweeper calls any function. A study trains runs, so here its samplers, spaces and user functions
are driven on the examples' functions; the stock sweeper itself is run beside this package's.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.driving import drive_study

from sweeps.space.points import grid_points
from sweeps.space.space import Point, Space
from sweeps.study.study import Study

SPHERE = {"x": "range(-5.5, 5.5, step=0.5)", "y": "choice(-5, 0, 5)"}


def sphere(point: Point) -> list[float]:
    return [sum(value**2 for value in point.values())]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [(["~z"], {"x", "y"}), (["~z", "x=choice(0, 1, 2)", "y=0"], {"x"})],
    ids=["of the config", "of the command line"],
)
def test_tpe_finds_the_sphere(
    arguments: list[str], names: set[str], tmp_path: Path
) -> None:
    seed = "hydra.sweeper.sampler.seed=123"
    points = drive_study(
        tmp_path / "a",
        "tpe",
        20,
        seed,
        params=SPHERE,
        values=sphere,
        arguments=arguments,
    )
    assert all(point.keys() == names for point in points if point)
    # Upstream's bound: the 95th percentile of 1000 seeds.
    assert min(sphere(point)[0] for point in points if point) <= 2.27


@pytest.mark.parametrize("trials", [10, 1])
def test_a_grid_is_tried_up_to_the_number_of_trials(
    trials: int, tmp_path: Path
) -> None:
    params = {
        "x": "choice(-1, 1)",
        "y": "range(-1.0, 1.0, step=1)",
        "z": "choice(foo, bar)",
    }
    grid = grid_points(Space.parse(params, []), 0)
    # The end of a range is not part of it, as in Hydra.
    assert len(grid) == 8

    def value(point: Point) -> list[float]:
        return [point["x"] ** 2 + point["y"] ** 2]

    points = drive_study(
        tmp_path / "a",
        "grid",
        min(trials, len(grid)),
        params=params,
        values=value,
        points=[("grid", point) for point in grid],
    )
    best = min(points, key=value)
    assert best["x"] in (-1, 1)
    assert best["y"] in (-1, 0)
    assert best["z"] in ("foo", "bar")
    if trials >= len(grid):
        assert value(best) == [1]


@pytest.mark.parametrize(
    ("arguments", "steps"), [([], {0, 0.5}), (["x=range(0, 5)", "y=range(0, 3)"], {0})]
)
def test_two_objectives_have_a_front(
    arguments: list[str], steps: set[float], tmp_path: Path
) -> None:
    def binh_and_korn(point: Point) -> list[float]:
        x, y = point["x"], point["y"]
        return [4 * x**2 + 4 * y**2, (x - 5) ** 2 + (y - 5) ** 2]

    points = drive_study(
        tmp_path / "a",
        "random",
        20,
        "hydra.sweeper.sampler.seed=123",
        "hydra.sweeper.direction=[minimize,minimize]",
        params={"x": "range(0, 5, step=0.5)", "y": "range(0, 3, step=0.5)"},
        values=binh_and_korn,
        arguments=arguments,
    )
    assert {value % 1 for point in points for value in point.values()} <= steps
    front = [trial.values for trial in Study.load(tmp_path / "a").optuna.best_trials]
    assert front
    for values in front:
        for other in map(binh_and_korn, filter(None, points)):
            is_no_worse = all(a <= b for a, b in zip(other, values, strict=True))
            assert not (is_no_worse and other != values)


FUNCTION = """
def configure(cfg, trial):
    x = trial.params["x"]
    most = cfg.max_z_difference_from_x
    trial.suggest_float("z", x - most, x + most)
    trial.suggest_float("+w", 0.0, 1.0)
"""


def test_a_custom_search_space_adds_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a module whose name is no word of Python, in the working directory."""
    (tmp_path / "custom-search-space-objective.py").write_text(FUNCTION)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    points = drive_study(
        tmp_path / "a",
        "random",
        20,
        "hydra.sweeper.sampler.seed=123",
        "hydra.sweeper.custom_search_space=custom-search-space-objective.configure",
        params={"x": "range(-5.5, 5.5, 0.5)", "y": "choice(-5, 0, 5)"},
        values=sphere,
        config={"max_z_difference_from_x": 0.3},
    )
    for point in points:
        assert abs(point["x"] - point["z"]) <= 0.3
        assert 0 <= point["+w"] <= 1


APPLICATION = """
import hydra

@hydra.main(version_base=None, config_path=".", config_name="config")
def main(config):
    if config.error:
        raise RuntimeError("config.error is true")
    return config.x**2 + config.y**2

main()
"""
CONFIG: dict[str, Any] = {
    "defaults": ["_self_", {"override hydra/sweeper": "optuna"}],
    "hydra": {"sweeper": {"params": SPHERE, "study_name": "sphere", "n_trials": 20}},
    "x": 1,
    "y": 1,
    "z": 1,
    "error": False,
}


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.5, 1.0])
@pytest.mark.parametrize("fails", [False, True], ids=["sphere", "failing"])
def test_an_application_with_the_stock_sweeper_runs_as_before(
    fails: bool, rate: float, tmp_path: Path
) -> None:
    """This package's sweeper has the same name, but is that of its own config folder."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "app.py").write_text(APPLICATION)
    words = [
        "--multirun",
        "hydra.sweep.dir=out",
        "hydra.sweeper.n_jobs=1",
        "hydra.sweeper.sampler.seed=123",
        f"hydra.sweeper.max_failure_rate={rate}",
        f"error={str(fails).lower()}",
        "~z",
    ]
    ended = subprocess.run(
        [sys.executable, "app.py", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if fails:
        assert ("RuntimeError: config.error is true" in ended.stderr) == (rate < 1)
        return
    assert ended.returncode == 0, ended.stderr
    results = yaml.safe_load(
        (tmp_path / "out" / "optimization_results.yaml").read_text()
    )
    assert results["name"] == "optuna"
    assert results["best_value"] <= 2.27
